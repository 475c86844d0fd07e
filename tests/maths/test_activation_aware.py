"""Activation-aware scales: against the outputs themselves, sample by sample."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.activation_aware import EXPONENTS, aware_scales
from tersor.maths.uniform_grid import dequantize, uniform_grid


def rounded(w: Tensor) -> Tensor:
    codes, scale, _ = uniform_grid(w, 3, per="group", group=4)
    return dequantize(codes, scale, None, 4)


def layer(seed: int, outs: int = 6, ins: int = 8) -> tuple[Tensor, Tensor]:
    """(w, inputs of which some are large)."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(50, ins, generator=made) * torch.tensor([20.0, 1, 1, 5, 1, 0.2, 1, 1])[:ins]
    return torch.randn(outs, ins, generator=made), x


def output_error(ws: list[Tensor], x: Tensor, s: Tensor) -> float:
    """The mean square error of outputs, from the outputs."""
    total = 0.0
    for w in ws:
        made = rounded((w.double() * s).float()).double()
        total += float(((x.double() / s) @ made.T - x.double() @ w.double().T).square().sum(1).mean())
    return total


@given(st.integers(0, 99), st.integers(1, 3))
def test_the_exponent_with_the_least_error_of_outputs_is_taken(seed: int, count: int) -> None:
    """By a slow loop over all exponents, on the samples. Layers that read the same share their factors."""
    ws, x = [layer(seed + 100 * k)[0] for k in range(count)], layer(seed)[1]
    s, share = aware_scales(ws, x.T.double() @ x.double() / len(x), rounded)
    size = x.double().square().mean(0).sqrt()
    tried = {}
    for exponent in (0.0, *EXPONENTS):
        factor = size**exponent
        tried[exponent] = output_error(ws, x, factor / factor.log().mean().exp())
    assert output_error(ws, x, s) <= min(tried.values()) * (1 + 1e-6)
    assert abs(share - min(tried.values()) / tried[0.0]) < 1e-6
    assert share <= 1
    assert abs(float(s.log().mean())) < 1e-9


def test_large_inputs_get_finer_steps_and_lower_errors() -> None:
    w, x = layer(1, outs=32)
    s, share = aware_scales([w], x.T.double() @ x.double() / len(x), rounded)
    assert share < 0.8
    assert s[0] > s[1]
    assert s[3] > s[1] > s[5]


def test_inputs_that_are_always_zero_have_no_factor() -> None:
    w, x = layer(2)
    x[:, 2] = 0
    s, _ = aware_scales([w], x.T.double() @ x.double() / len(x), rounded)
    assert s[2] == 1
    assert s.isfinite().all()
    s, share = aware_scales([w], torch.zeros(8, 8), rounded)
    assert (s == 1).all()
    assert share == 1
