"""Scoring: what a metric takes down of one batch.

A metric of the raw output sees it, whatever it is, with the batch's target. One of logits (accuracy and the
like) sees them with the classes on axis 1, and the targets that they are scores of: a causal language model
that computes its own loss has its inputs as labels, so the scores at one token are of the next.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.errors import TaskError
from tersor.model.batches import fits, shapes
from tersor.model.logits import Given, logits_of
from tersor.model.losses import own_loss
from tersor.model.metric import Metric, Scores
from tersor.model.outputs import as_floats


def score(metric: Metric, output: Any, target: Any, given: Given, who: str) -> Scores:
    """One batch's scores by sample, checked, on the CPU; `given` are the task's logits."""
    fit = f"output {shapes(output)}, target {shapes(target)}"
    sized = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim)
    count = len(target) if sized else None
    try:
        seen, goal = as_floats(output), target
        if metric.kind is not None:
            seen, goal = compared(metric, seen, target, given)
        found = fits(lambda: metric.statistics(seen, goal), f"the metric does not fit: {fit}")
        return metric.checked(found, count, fit)
    except TaskError as error:
        raise TaskError(f"{who}: {error}") from error


def compared(metric: Metric, output: Any, target: Any, given: Given) -> tuple[Tensor, Any]:
    """The logits and targets of a metric of logits, classes on axis 1."""
    other = "Give the task a metric= of its own"
    try:
        found = logits_of(output, metric.kind if given is None else given, target, metric.name)
    except TaskError as error:
        raise TaskError(f"{error} {other}.") from None
    if len(found) != 1 or found[0].kind != metric.kind:
        kinds = " and ".join(item.kind for item in found)
        raise TaskError(f"{metric.name} is of {metric.kind}, and logits= gives {kinds}. {other}.")
    scores = found[0].scores
    causal = own_loss(output) is not None and "CausalLM" in type(output).__name__
    if causal and isinstance(target, Tensor) and target.ndim == 2 and scores.ndim == 3:
        return scores[:, :, :-1], target[:, 1:]
    return scores, target
