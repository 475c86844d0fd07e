"""Unit scores against slow loops over units and their slices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.maths.unit_scores import by_unit, in_order, median_scores, norm_scores, reading_scores


@st.composite
def families(draw):
    """(units, slices): weights of 1 to 4 dimensions, each cut along one of them, at indices in any order."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    units, slices = draw(st.integers(1, 6)), []
    for _ in range(draw(st.integers(1, 3))):
        each, spare = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        axis = draw(st.integers(0, len(shape) - 1))
        shape[axis] = units * each + spare
        index = torch.randperm(shape[axis], generator=g)[: units * each].reshape(units, each)
        slices.append((torch.randn(shape, generator=g), axis, index))
    return units, slices


def elements(w, axis, index, u):
    """The elements of a unit, in the order of its indices."""
    found = []
    for k in index[u].tolist():
        for place in itertools.product(*(range(n) for d, n in enumerate(w.shape) if d != axis)):
            found.append(float(w[(*place[:axis], k, *place[axis:])]))
    return found


def scaled(scores):
    mean = sum(scores) / len(scores)
    return [s / mean for s in scores]


@settings(deadline=None, max_examples=60)
@given(families(), st.sampled_from([1, 2]))
def test_norms(family, power):
    """Each weight counts by its number of elements a slice, so that large layers do not decide alone."""
    units, slices = family
    wanted = [
        sum(
            sum(abs(x) ** power for x in elements(w, axis, index, u)) / (w.numel() / w.shape[axis])
            for w, axis, index in slices
        )
        for u in range(units)
    ]
    assert norm_scores(slices, power).tolist() == pytest.approx(scaled(wanted))


@settings(deadline=None, max_examples=60)
@given(families())
def test_sums(family):
    units, slices = family
    for w, axis, index in slices:
        wanted = [sum(elements(w, axis, index, u)) for u in range(units)]
        assert by_unit(w, axis, index).tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(families())
def test_median(family):
    units, slices = family
    rows = [[x for w, axis, index in slices for x in elements(w, axis, index, u)] for u in range(units)]
    wanted = [
        sum(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for other in rows)
        for one in rows
    ]
    if units > 1:
        assert median_scores(slices).tolist() == pytest.approx(scaled(wanted), rel=1e-5)
    else:
        assert median_scores(slices).tolist() == [0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_reading(seed, units, sizes):
    """|W_u|^2 H_uu: what a layer reads of a unit, over all layers."""
    g = torch.Generator().manual_seed(seed)
    readers, wanted = [], [0.0] * units
    for size in sizes:
        width = units * size
        x = torch.randn(7, width, generator=g)
        w, h = torch.randn(4, width, generator=g), x.T @ x
        columns = torch.randperm(width, generator=g).reshape(units, size)
        readers.append((w, h, columns))
        for u in range(units):
            for k in columns[u].tolist():
                wanted[u] += sum(float(w[o, k]) ** 2 for o in range(4)) * sum(
                    float(x[b, k]) ** 2 for b in range(7)
                )
    assert reading_scores(readers).tolist() == pytest.approx(wanted, rel=1e-4)


def test_order_and_damage():
    """Equal scores keep their order, and no score counts as less than nothing."""
    order, damage = in_order(torch.tensor([3.0, 1.0, -0.5, 1.0]))
    assert order.tolist() == [2, 1, 3, 0]
    assert damage.tolist() == [0.0, 0.0, 1.0, 2.0, 5.0]


def test_units_without_weights_score_nothing():
    zero = (torch.zeros(4, 3), 0, torch.arange(4)[:, None])
    assert norm_scores([zero], 1).tolist() == [0.0] * 4
    assert median_scores([zero]).tolist() == [0.0] * 4
