"""Evaluate: a candidate's metric with its 95 % interval, its bytes and the time of the pass."""

from __future__ import annotations

import math
from typing import Any

from tersor.candidates.candidate import Candidate
from tersor.candidates.scored import scored
from tersor.measure.accuracy import Estimate, estimated
from tersor.model.task import Task
from tersor.record.observer import Observer


def evaluate(of: Candidate, task: Task, observer: Observer | None = None) -> dict[str, Any]:
    """The facts, as JSON: file, task, metric, value [value, low, high], n samples, seconds. An end of the
    interval that is infinite is None. TaskError if the task does not fit the candidate."""
    observer = observer or Observer()
    observer.step(1, 1, f"score {of.name}")
    found = scored(of, task, observer)
    metric = task.scored
    return {
        "file": of.facts, "task": task.name, "metric": metric.name, "unit": metric.unit,
        "better": metric.better, **valued(estimated(found.scores, metric)), "seconds": found.seconds,
    }  # fmt: skip


def valued(found: Estimate) -> dict[str, Any]:
    ends = [end if math.isfinite(end) else None for end in (found.low, found.high)]
    return {"value": [found.value, *ends], "n": found.n}
