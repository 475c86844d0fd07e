"""Scoring: score one batch with a metric.

A metric of the raw output gets it unchanged, with the batch's target. A metric of logits (accuracy and the
like) gets logits with the classes on axis 1, and the matching targets: the labels of a causal language model
are its inputs, so the scores at one token are of the next (causal.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.errors import TaskError
from tersor.model.batches import fits, shapes
from tersor.model.causal import causal, moved
from tersor.model.logits import Given, logits_of
from tersor.model.metric import Metric, Scores
from tersor.model.outputs import as_floats


def score(
    metric: Metric, output: Any, target: Any, given: Given, who: str, *, batch: Any = None
) -> Scores:  # fmt: skip
    """The scores of each sample of a batch, checked, on the CPU; `given` is the task's logits=."""
    fit = f"output {shapes(output)}, target {shapes(target)}"
    sized = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim)
    count = len(target) if sized else None
    try:
        seen, goal = as_floats(output), target
        if metric.kind is not None:
            seen, goal = compared(metric, seen, target, given, batch)
        found = fits(lambda: metric.statistics(seen, goal), f"the metric does not fit: {fit}")
        return metric.checked(found, count, fit)
    except TaskError as error:
        raise TaskError(f"{who}: {error}") from error


def compared(
    metric: Metric, output: Any, target: Any, given: Given, batch: Any = None
) -> tuple[Tensor, Any]:  # fmt: skip
    """(logits, targets) for a metric of logits, classes on axis 1."""
    other = "Give the task a metric= of its own"
    try:
        found = logits_of(output, metric.kind if given is None else given, target, metric.name)
    except TaskError as error:
        raise TaskError(f"{error} {other}.") from None
    if len(found) != 1 or found[0].kind != metric.kind:
        kinds = " and ".join(item.kind for item in found)
        raise TaskError(f"{metric.name} is for {metric.kind}, but logits= returns {kinds}. {other}.")
    if not causal(output, target, batch):
        return found[0].scores, target
    logits, target, _ = moved(found[0], target, None)
    return logits.scores, target
