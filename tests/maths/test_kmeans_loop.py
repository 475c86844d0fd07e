"""The compiled layers of exact k-means against the same recursion with arrays: equal bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.maths.kmeans_loop import layers


def layer(before, sums, k):
    """(best[k], optimal j) for every i in k + 1..N: all i of one depth of the recursion together."""
    count = len(before) - 1
    best, where = np.full(count + 1, np.inf), np.full(count + 2, count)
    where[: k + 1] = k
    step = 1 << max(0, (count - k).bit_length() - 1)
    while step:
        i = np.arange(k + step, count + 1, 2 * step)
        low = where[i - step]
        high = np.maximum(low, np.minimum(where[np.minimum(i + step, count + 1)], i - 1))
        for at, first, last in zip(i, low, high, strict=True):
            j = np.arange(first, last + 1)
            mass, x, square = sums
            total = before[j] - square[j] - (x[at] - x[j]) ** 2 / (mass[at] - mass[j])
            best[at], where[at] = total.min() + square[at], j[total.argmin()]
        step //= 2
    return best, where[:-1]


def by_arrays(best, sums, entries):
    origin = np.zeros((entries, len(best)), np.int32)
    for k in range(1, entries):
        best, origin[k] = layer(best, sums, k)
    return best, origin


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_loops_and_arrays_agree(count: int, entries: int, seed: int, equal: bool) -> None:
    draw = np.random.default_rng(seed)
    # Points on a grid have many equal costs, of which the first start counts.
    x = np.arange(count) / max(count, 2) if equal else np.sort(draw.normal(size=count))
    mass = np.ones(count) if equal else draw.integers(1, 9, count).astype(float)
    sums = tuple(np.concatenate([[0.0], (mass * x**power).cumsum()]) for power in (0, 1, 2))
    first = np.full(count + 1, np.inf)
    first[1:] = sums[2][1:] - sums[1][1:] ** 2 / sums[0][1:]
    first[0] = 0.0
    entries = min(entries, count)
    best, origin = by_arrays(first.copy(), sums, entries)
    ours, found = first.copy(), np.zeros((entries, count + 1), np.int32)
    layers(ours, *sums, found)
    assert ours.tobytes() == best.tobytes()
    assert (found == origin).all()


@pytest.mark.parametrize("count", [64, 1000])
def test_a_row_costs_near_linear_work(count: int) -> None:
    """Searches halve: the starts tried for one layer are at most (N + ranges) at each of log2 N depths."""
    x = np.sort(np.random.default_rng(0).normal(size=count))
    sums = tuple(np.concatenate([[0.0], (x**power).cumsum()]) for power in (0, 1, 2))
    first = np.concatenate([[0.0], sums[2][1:] - sums[1][1:] ** 2 / sums[0][1:]])
    best, origin = by_arrays(first, sums, 2)
    assert (np.diff(origin[1, 2:]) >= 0).all()  # what the halving needs
    assert best[-1] < first[-1]
