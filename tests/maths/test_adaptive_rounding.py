"""Adaptive rounding: against all roundings up and down, one by one, and against what it must never exceed."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maths.test_compensation import GRIDS, SHAPES, rows_of
from torch import Tensor

from tersor.maths.adaptive_rounding import adapted, adaround, beside, learned
from tersor.maths.compensation import OnGrid, Rows, gptq, nearest


def least(rows: Rows, grid: OnGrid) -> Tensor:
    """The least cost of each row [G, O] over all 2^I ways to go down or up, by trying them."""
    scale, shift, (low, high) = grid.step, grid.shift, grid.ends
    exact = rows.w / scale + shift
    found = torch.full(rows.w.shape[:2], torch.inf, dtype=torch.float64)
    for up in itertools.product((0.0, 1.0), repeat=rows.w.shape[2]):
        codes = (exact.floor().clamp(low, high - 1) + torch.tensor(up)).clamp(low, high)
        gap = ((codes - shift) * scale).double() - rows.w
        found = torch.minimum(found, torch.einsum("goi,gij,goj->go", gap, rows.moment, gap))
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"per": "tensor"}, {"per": "group", "group": 4}, {"symmetric": False}, {"bits": 2}]
)
def test_it_is_near_the_best_of_all_roundings_and_often_it(settings: dict[str, Any]) -> None:
    """Over 32 rows of 10 weights. Rounding to the nearest costs nearly twice the least."""
    costs = []
    for seed in range(4):
        rows = rows_of(2, 4, 10, seed=seed)
        grid = nearest(rows, **{"bits": 3} | settings)
        made = adaround(rows, grid, damp=0.0)
        costs.append(torch.stack([least(rows, grid), *(rows.cost(q.decode()) for q in (made, grid))]))
    best, found, plain = torch.cat(costs, 1).flatten(1)
    assert (found >= best * (1 - 1e-6)).all(), "no rounding up or down costs less than the least"
    assert found.sum() < 1.15 * best.sum()
    assert plain.sum() > 1.4 * best.sum()
    assert (found <= best * (1 + 1e-6)).float().mean() > 0.4


def test_what_is_learned_alone_costs_much_less_than_the_nearest() -> None:
    """Before single weights change sides, and without the other start. The error is that of 48 rows."""
    found = plain = best = 0.0
    for seed in range(6):
        rows = rows_of(2, 4, 10, seed=seed)
        grid = nearest(rows, 3)
        below, above = beside(rows, grid)
        up = learned(rows, grid, below, above, damp=0.0)
        made = replace(grid, codes=torch.where(up, above, below))
        found += float(rows.cost(made.decode()).sum())
        plain += float(rows.cost(grid.decode()).sum())
        best += float(least(rows, grid).sum())
    assert found < 1.4 * best
    assert plain > 1.7 * best


def test_no_single_weight_is_better_on_its_other_side() -> None:
    rows = rows_of(2, 3, 7)
    grid = nearest(rows, 3)
    made = adaround(rows, grid, damp=0.01)
    below, above = beside(rows, grid)
    costs = rows.cost(made.decode())
    for g, o, i in itertools.product(*map(range, rows.w.shape)):
        codes = made.codes.clone()
        codes[g, o, i] = below[g, o, i] + above[g, o, i] - codes[g, o, i]
        assert rows.cost(replace(made, codes=codes).decode())[g, o] >= costs[g, o] * (1 - 1e-5)


@pytest.mark.wide
@given(SHAPES, GRIDS, st.booleans(), st.integers(0, 999))
def test_weights_go_to_a_level_beside_them_and_cost_no_more_than_the_nearest(
    shape: tuple[int, int, int], grids: dict[str, Any], masked: bool, seed: int
) -> None:
    rows = rows_of(*shape, masked=masked, seed=seed)
    base = nearest(rows, **grids)
    free = adaround(rows, base, damp=0.01)
    inside = (base.codes > base.ends[0]) & (base.codes < base.ends[1])
    assert ((free.decode() - rows.w).abs() <= base.step * (1 + 1e-4))[inside].all()
    made, kept = adapted(rows, base, base, damp=0.01)
    gaps = [each.decode().double() - rows.w for each in (base, made)]
    plain, cost = (torch.einsum("goi,gij,goj->go", gap, rows.moment, gap) for gap in gaps)
    if grids["per"] == "tensor":
        plain, cost = plain.sum(), cost.sum()
    assert (cost <= plain * (1 + 1e-6)).all()
    assert 0 <= kept <= plain.numel() * (1 if grids["per"] != "tensor" else shape[0] * shape[1])
    low, high = made.ends
    assert (made.codes == made.codes.round()).all()
    assert ((made.codes >= low) & (made.codes <= high)).all()
    assert torch.equal(made.scale, base.scale)
    if rows.keep is not None:
        assert (made.decode()[~rows.keep] == 0).all()


def test_rows_that_the_nearest_suits_better_keep_it_and_are_counted() -> None:
    """On a grid of one level for all weights nothing that is learned is any good."""
    rows = rows_of(1, 6, 5)
    base = nearest(rows, 4)
    coarse = replace(base, scale=base.scale * torch.tensor([1.0, 50.0, 1.0, 50.0, 50.0, 1.0])[:, None])
    made, kept = adapted(rows, base, coarse, damp=0.01)
    assert kept >= 3
    assert torch.equal(made.scale[0, [1, 3, 4]], base.scale[0, [1, 3, 4]])
    assert (rows.cost(made.decode()) <= rows.cost(base.decode())).all()


def test_without_correlations_it_is_rounding_to_the_nearest() -> None:
    rows = rows_of(1, 4, 9)
    alone = Rows.of(rows.w, torch.eye(9)[None] * 3.0, damp=0.01, who="test")
    grid = nearest(alone, 4)
    assert torch.equal(adaround(alone, grid, damp=0.01).codes, grid.codes)


def test_inputs_that_are_always_zero_leave_weights_at_the_nearest() -> None:
    rows = rows_of(1, 3, 6)
    moment = rows.moment.clone()
    moment[:, 2], moment[:, :, 2] = 0, 0
    rows = Rows.of(rows.w, moment, damp=0.01, who="test")
    grid = nearest(rows, 4)
    assert torch.equal(adaround(rows, grid, damp=0.01).codes[..., 2], grid.codes[..., 2])


def test_groups_of_a_convolution_are_rounded_independently() -> None:
    rows = rows_of(3, 4, 6)
    whole = adaround(rows, nearest(rows, 3), damp=0.01)
    for g in range(3):
        one = Rows.of(rows.w[g : g + 1], rows.moment[g : g + 1], damp=0.01, who="test")
        alone = adaround(one, nearest(one, 3), damp=0.01)
        assert torch.equal(whole.codes[g : g + 1], alone.codes)


def test_it_moves_less_far_than_gptq_and_costs_less_than_the_nearest() -> None:
    rows = rows_of(1, 8, 40)
    grid = nearest(rows, 3)
    plain, learned, free = (
        rows.cost(each.decode()).sum() for each in (grid, adaround(rows, grid, damp=0.01), gptq(rows, grid))
    )
    assert learned < 0.6 * plain
    below, above = beside(rows, grid)
    codes = gptq(rows, grid).codes
    assert ((codes < below) | (codes > above)).any(), "gptq moves further on this problem"
    assert free > 0
