"""Soft rounding: against slow loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.maths.soft_rounding import inverse, pair, settled, upward


def test_the_share_upward_and_its_inverse() -> None:
    h = torch.linspace(0, 1, 101)
    assert (upward(inverse(h)) - h).abs().max() < 1e-6
    assert upward(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


@given(st.integers(-2, 1), st.floats(-5, 5), st.sampled_from([(-1, 1), (-2, 1), (0, 3), (-8, 7)]))
def test_the_pair_has_the_given_code_and_its_neighbor_towards_the_weight(
    code: int, exact: float, ends: tuple[int, int]
) -> None:
    low, high = ends
    code = min(max(code, low), high)
    below = int(pair(torch.tensor([float(code)]), torch.tensor([exact]), low, high))
    both = (below, below + 1)
    assert code in both
    assert low <= below < high
    (other,) = set(both) - {code}
    towards = code + 1 if torch.tensor(exact) > code else code - 1
    if low <= towards <= high:
        assert other == towards


@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_those_nearest_to_a_level_settle_first_and_none_is_set_free(
    size: int, seed: int, data: st.DataObject
) -> None:
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    few = data.draw(st.integers(0, size))
    many = data.draw(st.integers(few, size))
    first = settled(v, torch.zeros(size, dtype=torch.bool), few)
    moved = v.roll(3)  # it was learned on
    second = settled(moved, first, many)
    by_hand = sorted(range(size), key=lambda i: -abs(float(v[i])))[:few]
    assert {*by_hand} == {*first.nonzero().flatten().tolist()}
    assert int(second.sum()) == many
    assert bool(second[first].all())
    rest = moved.abs().masked_fill(first, -1)
    new = second & ~first
    if new.any() and (~second).any():
        assert float(rest[new].min()) >= float(rest[~second].max())
