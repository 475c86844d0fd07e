"""Compensated rounding: against a slow loop with explicit inverses, and against what it must never exceed."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import RefusedError
from tersor.maths.compensation import OnGrid, Rows, better, compensated, descent, gptq, nearest, refitted

DAMP = 0.01


def moments(groups: int, count: int, seed: int = 0) -> Tensor:
    """Second moments of correlated inputs of unequal size, [G, I, I]."""
    x = torch.randn(groups, 2 * count + 1, count, generator=torch.Generator().manual_seed(seed))
    x = (x + 0.8 * x.roll(1, 2) + 0.3) * torch.linspace(0.2, 2, count)
    return x.mT.double() @ x.double() / x.shape[1]


def rows_of(groups: int, outs: int, ins: int, *, masked: bool = False, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, outs, ins, generator=draw)
    keep = torch.rand(w.shape, generator=draw) < 0.6 if masked else None
    w = w if keep is None else w * keep
    return Rows.of(w, moments(groups, ins, seed), keep, damp=DAMP, who="test")


def slow_gptq(rows: Rows, grid: OnGrid) -> Tensor:
    """Frantar 2022, algorithm 1, without its Cholesky factor: the inverse of what is left, in each column."""
    low, high = grid.ends
    codes = torch.zeros(rows.w.shape)
    for g, outs in itertools.product(range(len(rows.w)), [rows.w.shape[1]]):
        h = rows.moment[g] + DAMP * rows.moment[g].diagonal().mean() * torch.eye(rows.moment.shape[1])
        left = sorted(range(len(h)), key=lambda k: -float(rows.moment[g, k, k]))
        w = rows.w[g].double().clone()
        while left:
            k, inverse = left[0], torch.linalg.inv(h[left][:, left])
            for o in range(outs):
                step, zero = float(grid.step[g, o, k]), float(grid.shift[g, o, k])
                code = min(max(round(float(w[o, k]) / step) + zero, low), high)
                if rows.keep is not None and not rows.keep[g, o, k]:
                    code = zero
                codes[g, o, k] = code
                w[o, left] -= (w[o, k] - (code - zero) * step) / inverse[0, 0] * inverse[0]
            left = left[1:]
    return codes


@pytest.mark.parametrize(
    ("shape", "settings", "masked"),
    [
        ((1, 1, 1), {}, False),
        ((1, 5, 9), {}, False),
        ((3, 2, 7), {}, False),
        ((1, 4, 70), {"bits": 3}, False),  # more columns than a block
        ((1, 4, 9), {"per": "tensor"}, False),
        ((1, 4, 10), {"per": "group", "group": 4}, False),
        ((2, 3, 8), {"per": "group", "group": 3, "symmetric": False}, False),
        ((1, 5, 9), {"symmetric": False}, True),
        ((2, 5, 9), {"bits": 2}, True),
    ],
)
def test_codes_are_those_of_a_slow_loop(
    shape: tuple[int, int, int], settings: dict[str, Any], masked: bool
) -> None:
    rows = rows_of(*shape, masked=masked)
    grid = nearest(rows, **{"bits": 4} | settings)
    found = gptq(rows, grid)
    same = (found.codes == slow_gptq(rows, grid)).float().mean()
    assert same > 0.98, "a tie in float32 may round the other way, and move a few behind it"
    assert torch.equal(found.scale, grid.scale)
    if masked:
        assert rows.keep is not None
        assert (found.decode()[~rows.keep] == 0).all()


GRIDS = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 10),
        "per": st.sampled_from(["tensor", "channel", "group"]),
        "group": st.integers(1, 9),
        "symmetric": st.booleans(),
    }
)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))


@given(SHAPES, GRIDS, st.booleans(), st.booleans(), st.integers(0, 999))
def test_it_never_costs_more_than_the_nearest(
    shape: tuple[int, int, int], grids: dict[str, Any], masked: bool, search: bool, seed: int
) -> None:
    rows = rows_of(*shape, masked=masked, seed=seed)
    base = nearest(rows, **grids)
    made = compensated(rows, base, search=search)
    gaps = [(each.decode().double() - rows.w) for each in (base, made)]
    plain, cost = (float(torch.einsum("goi,gij,goj->", gap, rows.moment, gap)) for gap in gaps)
    assert cost <= plain * (1 + 1e-6)
    low, high = made.ends
    assert (made.codes == made.codes.round()).all()
    assert (made.codes >= low).all()
    assert (made.codes <= high).all()
    if not search:
        assert torch.equal(made.scale, base.scale)
    if rows.keep is not None:
        assert (made.decode()[~rows.keep] == 0).all()


def test_no_single_code_is_better_after_descent() -> None:
    rows = rows_of(2, 3, 6)
    made = descent(rows, nearest(rows, 3))
    costs, (low, high) = rows.cost(made.decode()), made.ends
    for g, o, i in itertools.product(*map(range, rows.w.shape)):
        for code in range(low, high + 1):
            codes = made.codes.clone()
            codes[g, o, i] = code
            other = OnGrid(codes, made.scale, None, 3, "channel", 6)
            assert rows.cost(other.decode())[g, o] >= costs[g, o] * (1 - 1e-5)


@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_the_fitted_scales_are_the_minimum(per: str) -> None:
    rows = rows_of(2, 4, 8)
    made = refitted(rows, nearest(rows, 3, per=per, group=3))
    least = rows.cost(made.decode()).sum()
    for at in itertools.product(*map(range, made.scale.shape)):
        for factor in (0.99, 1.01):
            scale = made.scale.clone()
            scale[at] *= factor
            other = OnGrid(made.codes, scale, None, 3, per, 3)
            assert rows.cost(other.decode()).sum() > least


@pytest.mark.parametrize("per", ["channel", "group"])
def test_groups_of_a_convolution_are_rounded_independently(per: str) -> None:
    rows = rows_of(3, 4, 6)
    whole = compensated(rows, nearest(rows, 3, per=per, group=4), search=True)
    for g in range(3):
        one = Rows.of(rows.w[g : g + 1], rows.moment[g : g + 1], damp=DAMP, who="test")
        alone = compensated(one, nearest(one, 3, per=per, group=4), search=True)
        torch.testing.assert_close(whole.decode()[g : g + 1], alone.decode())


def test_a_search_helps_where_the_largest_weight_is_far_out() -> None:
    """A grid that holds an outlier of a small input leaves no levels for the others."""
    rows = rows_of(1, 4, 32)
    w = rows.w.clone()
    w[..., 0] = 30.0
    rows = Rows.of(w, rows.moment, damp=DAMP, who="test")
    base = nearest(rows, 3)
    kept, searched = (rows.cost(compensated(rows, base, search=s).decode()).sum() for s in (False, True))
    assert searched < 0.5 * kept


def test_the_better_of_two_is_taken_row_by_row_where_scales_allow_it() -> None:
    rows = rows_of(1, 6, 5)
    for per in ("channel", "tensor"):
        a = nearest(rows, 3, per=per)
        b = nearest(rows, 3, per=per, range="mse")
        costs = torch.stack([rows.cost(a.decode()), rows.cost(b.decode())])
        wanted = costs.amin(0).sum() if per == "channel" else costs.sum(2).amin()
        assert torch.isclose(rows.cost(better(rows, a, b).decode()).sum(), wanted)


def test_inputs_that_are_always_zero_cost_nothing_and_do_no_harm() -> None:
    rows = rows_of(1, 3, 6)
    moment = rows.moment.clone()
    moment[:, 2], moment[:, :, 2] = 0, 0
    rows = Rows.of(rows.w, moment, damp=DAMP, who="test")
    base = nearest(rows, 4)
    made = compensated(rows, base, search=True)
    assert made.decode().isfinite().all()
    assert float(rows.cost(made.decode()).sum()) <= float(rows.cost(base.decode()).sum())


def test_moments_that_overflowed_are_refused() -> None:
    with pytest.raises(RefusedError, match="test: the weights of its error are NaN or infinite"):
        Rows.of(torch.ones(1, 2, 2), torch.full((1, 2, 2), torch.inf), damp=DAMP, who="test")
