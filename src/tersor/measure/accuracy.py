"""Accuracy: a metric's value with its interval, and the drop between two models on the same samples.

one number a sample    value: the mean. interval: Wilson 1927 if all are 0 or 1, else mean +- 1.96 s /
                       sqrt(N). drop: paired by sample, so samples that both models get right or wrong cancel;
                       sharper than the difference of two intervals (McNemar 1947; Student 1908). Cost: one
                       pass over the scores
of a whole set         value = f(sums), f(list). interval, drop and p: paired bootstrap (maths/bootstrap.py)
A metric may be better when higher or when lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from tersor.errors import SettingError, TaskError
from tersor.maths import bootstrap
from tersor.maths.statistics import Z95, paired, wilson
from tersor.model.builtin_metrics import METRICS
from tersor.model.metric import LISTED, Metric, Scores

SIGNIFICANT = 0.05  # p below which a difference is significant
ACCURACY = METRICS["accuracy"]


@dataclass(frozen=True)
class Estimate:
    """A metric's value, in its own units (shares for accuracy), with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int  # samples


@dataclass(frozen=True)
class Drop:
    """The loss of a metric: positive is worse, negative is better."""

    amount: float  # in points if the metric is a share, else in its own unit
    low: float  # 95 % interval
    high: float
    p: float  # of "no difference"
    significant: bool  # worse, and p < 0.05


def accuracy(scores: Iterable[float]) -> Estimate:
    """The mean of scores, one a sample. The interval of a single score other than 0 or 1 is infinite, since
    it has no spread. SettingError without scores or with one that is not finite.
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


def drop(before: Any, after: Any, metric: Metric = ACCURACY) -> Drop:
    """The drop from `before` to `after`: scores of the same samples in the same order."""
    return estimates(before, after, metric)[2]


def factor(metric: Metric) -> float:
    """Factor from the metric's own unit to the unit of drops."""
    return 100.0 if metric.percent else 1.0


def estimated(scores: Any, metric: Metric = ACCURACY) -> Estimate:
    """A metric's value for one model, with its interval."""
    if metric.value is None:
        return accuracy(scores)
    (values,) = redrawn([scores], metric)
    return estimate(scores, metric, values)


def estimates(before: Any, after: Any, metric: Metric) -> tuple[Estimate, Estimate, Drop]:
    """The values of both models, and the drop of the second one."""
    times = metric.sign * factor(metric)
    if metric.value is None:
        mean, low, high, p = paired(listed("drop", before), listed("drop", after))
        was, now = accuracy(before), accuracy(after)
    else:
        if len(before) != len(after) or not len(before):
            raise SettingError(
                f"drop: {len(before)} samples before, {len(after)} after; give the same samples, at least 1"
            )
        first, second = redrawn([before, after], metric)
        was, now = estimate(before, metric, first), estimate(after, metric, second)
        mean, gains = now.value - was.value, second - first
        low, high, p = (
            (-math.inf, math.inf, 1.0) if was.n == 1 else (*bootstrap.interval(gains), bootstrap.p_of(gains))
        )
    amount, *ends = (-times * gain + 0.0 for gain in (mean, high, low))  # + 0.0: no "-0.00" in tables
    return was, now, Drop(amount, min(ends), max(ends), p, significant=p < SIGNIFICANT and amount > 0)


def redrawn(sets: list[Scores], metric: Metric) -> bootstrap.Floats:
    """The metric's values of each set, resampled R times with the same samples for all sets: [sets, R]."""
    if isinstance(sets[0], list):
        return bootstrap.of_lists(cast(list[list[Any]], sets), metric.number, metric.resamples or LISTED)
    return bootstrap.of_sums(
        cast(list[Tensor], sets), metric.number, metric.resamples or bootstrap.resamples(len(sets[0]))
    )


def estimate(scores: Scores, metric: Metric, values: bootstrap.Floats) -> Estimate:
    """The value of a set, with the interval of its resampled values."""
    n = len(scores)
    return Estimate(
        value_of(scores, metric), *((-math.inf, math.inf) if n == 1 else bootstrap.interval(values)), n
    )


def value_of(scores: Any, metric: Metric) -> float:
    """The value of a set. TaskError if it is not finite."""
    value = accuracy(scores).value if metric.value is None else metric.of(scores)
    if not math.isfinite(value):
        raise TaskError(f"metric {metric.name!r}: its value on the evaluation set is {value}, not a number")
    return value


def compared(before: Any, after: Any, metric: Metric = ACCURACY) -> dict[str, Any]:
    """Two models' scores on the same samples, as JSON: values and drop, each with its interval, the drop's p
    and the number of samples. An infinite end of an interval (one sample) is None. Metrics other than
    accuracy add their name, the unit of their drops, and whether higher or lower is better."""
    was, now, fall = estimates(before, after, metric)
    rows = {
        "before": [was.value, was.low, was.high], "after": [now.value, now.low, now.high],
        "drop": [fall.amount, fall.low, fall.high],
    }  # fmt: skip
    finite = {key: [value if math.isfinite(value) else None for value in row] for key, row in rows.items()}
    return {**finite, "p": fall.p, "n": now.n, **named(metric)}


def named(metric: Metric) -> dict[str, str]:
    """The name, unit and direction of a metric other than accuracy, as JSON."""
    return {} if metric is ACCURACY else {"metric": metric.name, "unit": metric.unit, "better": metric.better}


def in_words(found: Mapping[str, Any]) -> str:
    """ "0.9824 to 0.9799, drop +0.25 points": what `compared` found, in the metric's unit."""
    was, now, fall = (found[key][0] for key in ("before", "after", "drop"))
    if found.get("unit", "points") == "points":
        return f"{was:.4f} to {now:.4f}, drop {fall:+.2f} points"
    return f"{found['metric']} {was:.4f} to {now:.4f}, {found['better']} is better, drop {fall:+.4g}"


def listed(who: str, scores: Iterable[float]) -> list[float]:
    """Plain floats, at least one, all finite."""
    values = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if not isinstance(values, list) or any(isinstance(value, list) for value in values):
        raise SettingError(f"{who}: scores must be a flat list of numbers, one a sample")
    found = [float(value) for value in values]
    if not found:
        raise SettingError(f"{who}: no scores; the evaluation set has no samples")
    if not all(map(math.isfinite, found)):
        raise SettingError(f"{who}: {sum(not math.isfinite(value) for value in found)} scores are not finite")
    return found
