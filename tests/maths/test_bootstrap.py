"""The bootstrap against a slow loop, and by how often its intervals hold what is true."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths import bootstrap


def ratio(sums: Tensor) -> float:
    return float(sums[0] / sums[1]) if float(sums[1]) else math.nan


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 50), st.integers(1, 40))
def test_it_is_the_slow_loop(samples: int, width: int, seed: int, times: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sets = [torch.rand(samples, width + 1, generator=g) + 0.1 for _ in range(2)]
    found = bootstrap.of_sums(sets, ratio, times, seed)
    rng = np.random.default_rng(seed)  # the same draws, all at once
    places = rng.integers(0, samples, (times, samples))
    for k, one in enumerate(sets):
        for r in range(times):
            total = [0.0] * (width + 1)
            for place in places[r]:
                total = [a + float(b) for a, b in zip(total, one[place], strict=True)]
            assert found[k, r] == pytest.approx(total[0] / total[1], rel=1e-5)
    assert np.array_equal(found, bootstrap.of_sums(sets, ratio, times, seed)), "the same for a seed"


def test_slices_are_drawn_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    whole = bootstrap.of_sums([stats], ratio, 50)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 20)
    assert np.allclose(whole, bootstrap.of_sums([stats], ratio, 50))


def test_lists_are_drawn_in_pairs() -> None:
    numbers = list(range(9))
    found = bootstrap.of_lists([numbers, [10 * x for x in numbers]], lambda drawn: float(sum(drawn)), 30)
    assert np.array_equal(10 * found[0], found[1])
    assert len(set(found[0])) > 5


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    """Of 200 sets of 60 pairs the 95 % interval of a ratio of means holds the true one in about 95 %, and p
    is below 0.05 in about 5 % of those where nothing is there."""
    rng, held, small = np.random.default_rng(7), 0, 0
    for _ in range(200):
        x = torch.from_numpy(np.stack([rng.exponential(2.0, 60), rng.exponential(1.0, 60)], 1))
        y = torch.from_numpy(np.stack([rng.exponential(2.0, 60), rng.exponential(1.0, 60)], 1))
        first, second = bootstrap.of_sums([x, y], ratio, 400)
        low, high = bootstrap.interval(first)
        held += low <= 2.0 <= high
        small += bootstrap.p_of(second - first) < 0.05
    assert 178 <= held <= 199
    assert 2 <= small <= 22


def test_resamples_without_a_value() -> None:
    values = np.array([math.nan] * 3 + [1.0] * 97)
    assert bootstrap.interval(values) == (1.0, 1.0)
    assert bootstrap.interval(np.array([math.nan] * 6 + [1.0] * 94)) == (-math.inf, math.inf)
    assert bootstrap.p_of(np.full(5, math.nan)) == 1.0


def test_p_is_two_sided_and_never_0() -> None:
    assert bootstrap.p_of(np.zeros(99)) == 1.0
    assert bootstrap.p_of(np.ones(99)) == pytest.approx(2 / 100)
    assert bootstrap.p_of(np.array([1.0] * 95 + [-1.0] * 4)) == pytest.approx(2 * 5 / 100)


def test_large_sets_are_resampled_less_often() -> None:
    assert bootstrap.resamples(100) == bootstrap.RESAMPLES
    assert bootstrap.resamples(50_000) == 4_000
    assert bootstrap.resamples(10**9) == bootstrap.FEWEST
