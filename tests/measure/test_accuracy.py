"""Estimates and drops compared with scipy, simulation and plain arithmetic."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tersor.errors import SettingError
from tersor.measure.accuracy import accuracy, compared, drop

bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)


@given(bits)
def test_shares_have_wilsons_interval(scores: list[float]) -> None:
    found = accuracy(torch.tensor(scores))
    expected = stats.binomtest(int(sum(scores)), len(scores)).proportion_ci(method="wilson")
    assert found.n == len(scores)
    assert found.value == pytest.approx(sum(scores) / len(scores))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=40).filter(lambda v: not set(v) <= {0.0, 1.0}))
def test_other_scores_have_a_normal_interval(scores: list[float]) -> None:
    found = accuracy(scores)
    half = stats.norm.ppf(0.975) * np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert found.value == pytest.approx(np.mean(scores), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=1e-7)


def test_one_sample_and_float32() -> None:
    assert accuracy([0.5]).low == -math.inf
    one = accuracy([1.0])
    assert one.high == 1
    assert 0.2 < one.low < 0.21  # 1 / (1 + z^2)
    assert accuracy(torch.full((100_000,), 0.1)).value == pytest.approx(0.1, abs=1e-8)


@given(st.integers(1, 60), st.integers(0, 999))
def test_the_drop_of_shares(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 2, n).astype(float), rng.integers(0, 2, n).astype(float)
    found = drop(torch.from_numpy(before), torch.from_numpy(after))
    assert found.amount == pytest.approx(100 * (before.mean() - after.mean()))
    assert found.low <= found.amount <= found.high
    lost, won = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
    p = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert found.p == pytest.approx(p)
    assert found.significant == (p < 0.05 and lost > won)


def test_the_drop_of_other_scores() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(size=200)
    after = before - 0.1 + 0.2 * rng.normal(size=200)
    found, expected = drop(before, after), stats.ttest_rel(before, after)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert found.significant
    other = drop(after, before)
    assert (other.amount, other.low, other.high) == pytest.approx((-found.amount, -found.high, -found.low))
    assert not other.significant, "a gain is no drop"


def test_pairs_are_sharper_than_two_intervals() -> None:
    """9 of 1000 lost and none won is significant, although the two intervals overlap widely."""
    before = np.r_[np.ones(900), np.zeros(100)]
    after = np.r_[np.ones(891), np.zeros(109)]
    assert accuracy(after).high > accuracy(before).low
    assert drop(before, after).significant


def test_no_drop_has_no_sign() -> None:
    assert f"{drop([1, 0], [1, 0]).amount:+.2f}" == "+0.00"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([], "no scores"),
        (torch.zeros(0), "no scores"),
        ([1.0, math.nan], "1 scores are not finite"),
        (torch.zeros(2, 2), "a flat list of numbers"),
        (torch.tensor(1.0), "a flat list of numbers"),
    ],
)
def test_wrong_scores_are_refused(scores: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        accuracy(scores)
    with pytest.raises(SettingError, match=words):
        drop([1.0], scores)


def test_pairs_of_different_length() -> None:
    with pytest.raises(SettingError, match="2 scores before, 3 after"):
        drop([1, 0], [1, 0, 1])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_compared_is_both_as_json(scores: list[tuple[float, float]]) -> None:
    before, after = (list(side) for side in zip(*scores, strict=True))
    found = compared(before, after)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["before"][0], found["after"][0]) == (accuracy(before).value, accuracy(after).value)
    assert (found["drop"][0], found["p"], found["n"]) == (
        drop(before, after).amount,
        drop(before, after).p,
        len(scores),
    )
    if len(scores) > 1:
        assert tuple(found["drop"][1:]) == (drop(before, after).low, drop(before, after).high)


def test_one_sample_has_no_interval() -> None:
    found = compared([0.25], [0.5])
    assert found["before"] == [0.25, None, None]
    assert found["drop"] == [-25.0, None, None]
