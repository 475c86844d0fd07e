"""The density model against slow loops, numerical integration and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tersor.maths.density import PRIOR, Density, bits, expected, fit, flat, levels, slopes

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13)]


def some(shape: tuple[int, int], seed: int = 0) -> Density:
    """A density in which 0 is more probable than 1 everywhere, so that no cost is clipped to 0."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return Density(
        torch.full((1, 1), 3.0), torch.rand(rows, 1, generator=g), torch.rand(1, columns, generator=g),
        torch.rand(3, generator=g) + 0.1,
    )  # fmt: skip


def slow_bits(density: Density, codes: torch.Tensor) -> float:
    """Bits of each code, from probabilities."""
    first, second, third = density.levels.tolist()
    total = 0.0
    for o, row in enumerate(codes.tolist()):
        for i, q in enumerate(row):
            zero = 1 / (1 + math.exp(-float(density.common + density.row[o] + density.column[0, i])))
            if q == 0:
                total -= math.log(zero)
                continue
            total += -math.log(1 - zero) + math.log(2) + first
            total += second * (abs(q) >= 2) + third * max(abs(q) - 2, 0)
    return total / math.log(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_a_slow_loop(shape):
    codes = torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(1))
    assert float(bits(some(shape), codes)) == pytest.approx(slow_bits(some(shape), codes), rel=1e-5)


def test_probabilities_of_all_codes_add_up_to_one():
    learned = fit(flat(torch.zeros(4, 6)), torch.tensor([[0, 1, -2, 0, 5, 0]] * 4), 4)
    for place in range(6):
        total = 0.0
        for q in range(-400, 401):
            codes = torch.zeros(4, 6, dtype=torch.int64)
            codes[2, place] = q
            rest = codes.clone()
            rest[2, place] = 0
            zero = float(torch.sigmoid(-learned.odds)[2, place])
            total += 2.0 ** -float(bits(learned, codes) - bits(learned, rest)) * (1 - zero)
        assert total == pytest.approx(1, abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=12, max_size=12))
def test_expected_is_the_integral_over_the_noise(values):
    """Each code changes at one value of the noise. In between the bits are constant, so the sum is exact."""
    exact, density = torch.tensor(values, dtype=torch.float64).reshape(3, 4), some((3, 4))
    moves = (0.5 - (exact - exact.floor()).flatten() + 0.5) % 1 - 0.5
    ends = torch.cat([torch.tensor([-0.5, 0.5]).double(), moves]).sort().values
    spans = zip(ends.tolist(), ends[1:].tolist(), strict=False)
    mean = sum((b - a) * float(bits(density, (exact + (a + b) / 2).round())) for a, b in spans)
    assert float(expected(density, exact)) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_slopes_are_the_gradient(shape):
    exact = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 8 - 4).double()
    density = Density(*(value.double() for value in some(shape)))
    exact.requires_grad_()
    (wanted,) = torch.autograd.grad(expected(density, exact), exact)
    assert torch.allclose(slopes(density, exact.detach()), wanted)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_fit_finds_the_most_probable_density(share):
    g = np.random.default_rng(3)
    lean = g.normal(0, 1.5, (12, 1)) + g.normal(0, 1.5, (1, 17))
    used = (g.random((12, 17)) < share * 2 / (1 + np.exp(lean))).astype(float)

    def cost(x: np.ndarray) -> float:
        odds = x[0] + x[1:13, None] + x[None, 13:]
        seen = np.logaddexp(0, np.where(used > 0, odds, -odds)).sum()
        half = 0.5 * np.logaddexp(0, x[0]) + 0.5 * np.logaddexp(0, -x[0])
        return seen + half + PRIOR / 2 * (x[1:] ** 2).sum()

    best = minimize(cost, np.zeros(30)).fun
    found = fit(flat(torch.zeros(12, 17)), torch.from_numpy(used), 200)
    at = np.concatenate([found.common.flatten(), found.row.flatten(), found.column.flatten()])
    assert cost(at) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_constant_codes_stay_finite(shape, fill):
    learned = fit(flat(torch.zeros(shape)), torch.full(shape, fill), 300)
    assert all(torch.isfinite(value).all() for value in learned)
    assert torch.isfinite(slopes(learned, torch.full(shape, float(fill)))).all()


def test_an_empty_row_has_cheaper_zeros_and_more_expensive_codes():
    codes = torch.randint(-1, 2, (20, 30), generator=torch.Generator().manual_seed(4))
    codes[5] = 0
    codes[:, 7] = 0
    learned = fit(flat(codes.float()), codes, 10)
    price = learned.first
    assert (price[5] > price[6]).all()
    assert (price[:, 7] > price[:, 8]).all()
    flat_cost = fit(flat(codes.reshape(1, -1).float()), codes.reshape(1, -1), 10)
    assert float(bits(learned, codes)) < float(bits(flat_cost, codes.reshape(1, -1)))


def test_a_vector_has_one_density_for_all():
    codes = torch.tensor([[3, 0, -1, 0, 0]])
    learned = fit(flat(codes.float()), codes, 10)
    assert not learned.column.any()
    assert not learned.row.any()
    assert float(torch.sigmoid(learned.odds[0, 0])) == pytest.approx((3 + 0.5) / (5 + 1), abs=1e-3)


def test_levels_by_hand():
    # 2 ones, 1 two, 1 four, plus 1/2 for each: P(one) = 2.5 / 4; P(a further step after two) = 2.5 / 4
    one, second, third = levels(torch.tensor([0, 1, 1, 2, 4])).tolist()
    assert one == pytest.approx(-math.log(2.5 / 5))
    assert third == pytest.approx(-math.log(2.5 / 5))
    assert second == pytest.approx(-math.log(0.5) - math.log(0.5) + math.log(0.5))
