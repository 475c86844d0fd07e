"""Statistics against exact integers, published examples, simulation and scipy.stats."""

import math
import random
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tersor.errors import SettingError
from tersor.maths.statistics import (
    entropy_bits,
    mcnemar,
    median_interval,
    paired,
    wilson,
)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_solves_its_equation(a, b):
    k, n = min(a, b), max(a, b, 1)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for edge in (low, high):
        if 0 < edge < 1:  # |share - edge| = z * sqrt(edge (1 - edge) / n)
            assert math.isclose(abs(k / n - edge), 1.96 * math.sqrt(edge * (1 - edge) / n), rel_tol=1e-6)


def test_wilson_known():
    assert wilson(0, 0) == (0, 1)
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial(lost, won, same):
    before = [1] * lost + [0] * won + [1] * same
    after = [0] * lost + [1] * won + [1] * same
    if not before:
        return
    n = lost + won
    tail = Fraction(sum(math.comb(n, j) for j in range(min(lost, won) + 1)), 2**n)
    assert math.isclose(mcnemar(before, after), min(1.0, float(2 * tail)), rel_tol=1e-9)


def test_mcnemar_with_many_samples():
    before, after = torch.ones(60_000), torch.ones(60_000)
    after[:10_200], before[10_200:20_000] = 0, 0
    z = 399 / math.sqrt(20_000)  # continuity-corrected normal
    assert math.isclose(mcnemar(before, after), math.erfc(z / math.sqrt(2)), rel_tol=1e-3)
    assert mcnemar([1, 0], [1, 0]) == 1.0


def test_paired_binary_interval_covers():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        cells = draw.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.8, 0.08, 0.04, 0.08], k=100)
        mean, low, high, p = paired([c[0] for c in cells], [c[1] for c in cells])
        assert low <= mean <= high
        assert 0 <= p <= 1
        back = paired([c[1] for c in cells], [c[0] for c in cells])
        assert back == pytest.approx((-mean, -high, -low, p))
        hits += low <= -0.04 <= high
    assert 0.93 < hits / 2000 < 0.98


def test_paired_t_covers_and_rejects_as_often_as_it_says():
    draw = random.Random(1)
    hits = wrong = 0
    for _ in range(2000):
        before = [draw.gauss(0, 3) for _ in range(8)]
        mean, low, high, p = paired(before, [b + draw.gauss(0.5, 1) for b in before])
        assert low <= mean <= high
        hits += low <= 0.5 <= high
        wrong += (p < 0.05) != (not low <= 0 <= high)
    assert 0.935 < hits / 2000 < 0.965
    assert wrong == 0


def test_paired_edges():
    assert paired([0.5], [0.7])[1:] == (-math.inf, math.inf, 1.0)
    assert paired([0.5, 0.2], [0.5, 0.2]) == (0, 0, 0, 1)
    mean, low, high, p = paired([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert (mean, low, high, p) == (1, 1, 1, 0.25)
    mean, low, high, p = paired([0] * 20, [1] * 20)
    assert mean == 1 == high
    assert 0.7 < low < 1
    with pytest.raises(SettingError, match="2 scores before, 1 after"):
        paired([1, 2], [1])
    with pytest.raises(SettingError, match="at least 1"):
        mcnemar([], [])


def test_student_table():
    """The interval's half width in standard errors, against the printed table."""
    draw = random.Random(3)
    for freedom, t in [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)]:
        gaps = [draw.gauss(0.2, 1) for _ in range(freedom + 1)]
        mean, low, high, _ = paired([0.0] * len(gaps), gaps)
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert math.isclose((high - mean) / error, t, abs_tol=6e-5)
        assert math.isclose(mean - low, high - mean)
        on_the_edge = [gap - mean + t * error for gap in gaps]  # their mean is t standard errors from 0
        assert math.isclose(paired([0.0] * len(gaps), on_the_edge)[3], 0.05, abs_tol=2e-5)


def test_scipy_agrees():
    draw = random.Random(2)
    for n in (2, 3, 17, 400):
        before = [draw.random() for _ in range(n)]
        after = [b + draw.gauss(0.1, 0.3) for b in before]
        mean, low, high, p = paired(before, after)
        want = stats.ttest_rel(after, before)
        interval = want.confidence_interval(0.95)
        assert math.isclose(p, want.pvalue, rel_tol=1e-8)
        assert math.isclose(low, interval.low, rel_tol=1e-8)
        assert math.isclose(high, interval.high, rel_tol=1e-8)
    for k, n in [(0, 10), (3, 10), (500, 1000)]:
        want = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-4)
    assert math.isclose(entropy_bits([3, 1, 9]), stats.entropy([3, 1, 9], base=2))


@settings(deadline=None)
@given(st.integers(1, 80), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_median_interval_is_the_tightest_that_holds(n, level):
    low, high = median_interval(random.Random(n).sample(range(n), n), level)
    k = int(low) + 1
    assert high == n - k

    def outside(k):  # P(median not within the k-th smallest and the k-th largest)
        return 2 * Fraction(sum(math.comb(n, j) for j in range(k)), 2**n)

    allowed = 1 - Fraction(str(level))
    if k > 1:
        assert outside(k) <= allowed
    if 2 * (k + 1) <= n:
        assert outside(k + 1) > allowed


def test_median_interval_known():
    assert median_interval(range(1, 11)) == (2, 9)
    assert median_interval(torch.tensor([3.0])) == (3, 3)
    with pytest.raises(SettingError, match="no values"):
        median_interval([])


def test_entropy():
    assert entropy_bits([5]) == 0
    assert entropy_bits([]) == 0
    assert entropy_bits([1, 1, 0, 1, 1]) == 2
    assert math.isclose(entropy_bits(torch.tensor([1, 3])), 0.25 * 2 + 0.75 * math.log2(4 / 3))
    with pytest.raises(SettingError, match="negative"):
        entropy_bits([1, -1])
