"""Accuracy: a mean score with how sure it is, and the drop between two models on the same samples.

value = mean of N scores      interval: Wilson 1927 where all are 0 or 1, else mean +- 1.96 s / sqrt(N)
drop  = 100 (before - after), paired sample by sample: what both models get right or wrong cancels, so it is
surer than the difference of two intervals (McNemar 1947; Student 1908). Cost: one pass over the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tersor.errors import SettingError
from tersor.maths.statistics import Z95, paired, wilson

SIGNIFICANT = 0.05  # p below which a difference counts as real


@dataclass(frozen=True)
class Estimate:
    """A mean score, in the metric's units (shares for accuracy), with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int  # samples


@dataclass(frozen=True)
class Drop:
    """What was lost, in points (hundredths of the metric's unit): positive is worse, negative is better."""

    points: float
    low: float  # 95 % interval, in points
    high: float
    p: float  # of "no difference"
    significant: bool  # worse, and p < 0.05


def accuracy(scores: Iterable[float]) -> Estimate:
    """The mean of scores, one a sample, larger is better. One score other than 0 or 1 says nothing of its
    spread: the interval is then infinite. SettingError without scores or with one that is not finite.
    """
    found = listed("accuracy", scores)
    n = len(found)
    mean = math.fsum(found) / n
    if set(found) <= {0.0, 1.0}:
        return Estimate(mean, *wilson(round(math.fsum(found)), n, z=Z95), n)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, n)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in found) / (n - 1))
    half = Z95 * spread / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def drop(before: Iterable[float], after: Iterable[float]) -> Drop:
    """What `after` lost against `before`, both one score a sample in the same order (larger is better)."""
    mean, low, high, p = paired(listed("drop", before), listed("drop", after))
    points, least, most = (-100 * gain + 0.0 for gain in (mean, high, low))  # + 0.0: no "-0.00" in tables
    return Drop(points, least, most, p, significant=p < SIGNIFICANT and points > 0)


def compared(before: Iterable[float], after: Iterable[float]) -> dict[str, Any]:
    """Two models' scores on the same samples, as JSON: values and drop, each with its interval, the drop's p
    and the number of samples. The end of an interval that has none (one sample) is None."""
    was, now, fall = accuracy(before), accuracy(after), drop(before, after)
    rows = {
        "before": [was.value, was.low, was.high], "after": [now.value, now.low, now.high],
        "drop": [fall.points, fall.low, fall.high],
    }  # fmt: skip
    told = {key: [value if math.isfinite(value) else None for value in row] for key, row in rows.items()}
    return {**told, "p": fall.p, "n": now.n}


def listed(who: str, scores: Iterable[float]) -> list[float]:
    """Plain floats, at least one, all finite."""
    values = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if not isinstance(values, list) or any(isinstance(value, list) for value in values):
        raise SettingError(f"{who}: scores are a row of numbers, one a sample")
    found = [float(value) for value in values]
    if not found:
        raise SettingError(f"{who}: there are no scores; the evaluation set gave no sample")
    if not all(map(math.isfinite, found)):
        raise SettingError(f"{who}: {sum(not math.isfinite(value) for value in found)} scores are not finite")
    return found
