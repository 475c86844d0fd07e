"""Rounding: against a loop over elements, and gradients against finite differences of a surrogate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.rounding import learned, on_grid, scale_gradient_factor
from tersor.maths.uniform_grid import code_limits

LIMITS = [code_limits(bits, signed) for bits in (1, 2, 4, 8, 16) for signed in (False, True)]


def one(x: float, scale: float, zero: int, low: int, high: int) -> float:
    """One element, in Python floats; rounds half to even."""
    return (min(max(round(x / scale) + zero, low), high) - zero) * scale


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from(LIMITS),
    st.integers(0, 7),
    st.sampled_from([0.25, 1.0, 2.0]),
)
def test_each_element_is_rounded_by_the_formula(
    halves: list[int], limits: tuple[int, int], at: int, scale: float
) -> None:
    """Multiples of a quarter step. They include ties, which must round to even before the zero is added."""
    zero = min(limits[0] + at, limits[1])
    x = torch.tensor(halves) * scale / 4
    want = torch.tensor([one(float(v), scale, zero, *limits) for v in x])
    arrays = torch.tensor(scale), torch.tensor(zero)
    assert torch.equal(on_grid(x, *arrays, limits), want)
    assert torch.equal(learned(x, *arrays, limits, 1.0).detach(), want)


def test_the_zero_is_added_after_rounding() -> None:
    y = on_grid(torch.tensor([0.5, 1.5]), torch.tensor(1.0), torch.tensor(1), (0, 255))
    assert y.tolist() == [0.0, 2.0]  # not 1 and 1: 0.5 + 1 would round up to 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_give_the_same_bits_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero = torch.rand(5, 1) / 50 + 0.01, torch.arange(100, 105)[:, None]
    a, b = on_grid(x, scale, zero, (0, 255)), learned(x, scale, zero, (0, 255), 0.1)
    assert a.dtype == b.dtype == dtype
    assert torch.equal(a, b)


def test_infinities_become_the_ends_and_nan_stays() -> None:
    x = torch.tensor([math.inf, -math.inf], requires_grad=True)
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(2)
    y = learned(x, scale, zero, (0, 7), 1.0)
    assert y.tolist() == on_grid(x.detach(), scale.detach(), zero, (0, 7)).tolist() == [2.5, -1.0]
    assert on_grid(torch.tensor(math.nan), torch.tensor(0.5), zero, (0, 7)).isnan()
    assert learned(torch.tensor(math.nan), scale, zero, (0, 7), 1.0).isnan()
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]
    assert float(scale.grad) == (7 - 2) + (0 - 2)


def surrogate(
    x: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int], at: tuple[Tensor, Tensor]
) -> Tensor:
    """The function whose true gradient is the straight-through gradient: near `at`, rounding adds a constant
    to x / scale, or the code stays at an end of the grid."""
    exact = at[0] / at[1] + zero
    moved = at[0].div(at[1]).round() - at[0] / at[1]
    inside = (exact >= limits[0]) & (exact <= limits[1])
    ends = exact.clamp(*limits) - zero
    return torch.where(inside, (x / scale + moved) * scale, ends * scale)


@pytest.mark.parametrize("limits", [(0, 7), (-4, 3), (0, 255)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1)], ids=str)
def test_gradients_are_finite_differences_of_the_surrogate(
    limits: tuple[int, int], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    scale = (torch.rand(shape, generator=generator, dtype=torch.float64) / 4 + 0.1).requires_grad_()
    zero = torch.full(shape, limits[0] + 2)
    pull = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (learned(x, scale, zero, limits, 0.25) * pull).sum().backward()
    at, eps = (x.detach(), scale.detach()), 1e-6

    def f(x: Tensor, scale: Tensor) -> float:
        return float((surrogate(x, scale, zero, limits, at) * pull).sum())

    for which, (value, grad, ease) in enumerate([(at[0], x.grad, 1.0), (at[1], scale.grad, 0.25)]):
        for i in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[i] = eps
            up, down = ([v + s * step if k == which else v for k, v in enumerate(at)] for s in (1, -1))
            want = ease * (f(*up) - f(*down)) / (2 * eps)
            assert float(grad.reshape(-1)[i]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_positive_negative_and_zero_scales_have_finite_gradients() -> None:
    for size in (-0.5, 0.5, 0.0):
        x, scale = torch.randn(7).requires_grad_(), torch.tensor(size, requires_grad=True)
        y = learned(x, scale, torch.tensor(3), (0, 7), 0.1)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert scale.grad.isfinite()


def test_the_ease_is_the_factor_of_lsq() -> None:
    assert scale_gradient_factor(torch.Size((8, 3, 4)), 1, 255) == pytest.approx((12 * 255) ** -0.5)
    assert scale_gradient_factor(torch.Size((8, 3, 4)), 3, 127) == pytest.approx((4 * 127) ** -0.5)
    assert scale_gradient_factor(torch.Size(()), 1, 0) == 1.0
