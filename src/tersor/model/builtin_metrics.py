"""Built-in metrics: the table of metrics by name. -100 marks a target that does not count.

accuracy         fraction of a sample's positions whose largest score is the target's; mean over samples
token_accuracy   the same fraction over all positions of the set
perplexity       exp(mean of -log p(target)) over all positions                        lower is better
mean_iou         mean over classes of |both| / |either|, positions of the whole set    Everingham 2010
macro_f1         mean over classes of 2 tp / (2 tp + fp + fn)                          van Rijsbergen 1979
pearson          correlation of outputs and targets, all numbers of the set            Pearson 1895
All but pearson score classes. Cost: O(B * K) a batch; mean_iou and macro_f1 keep 2 and 3 numbers a class and
sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TaskError, did_you_mean
from tersor.model.batches import shapes
from tersor.model.logits import IGNORED
from tersor.model.metric import Metric, from_torchmetric, is_torchmetric


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 if the largest of the K outputs is the target's, else 0; with several positions their mean.

    output [B, K] or [B, K, ...] (as cross_entropy takes it), target [B] or [B, ...] in 0..K-1; [B] float32.
    """
    counts = fitting("accuracy", output, target)
    hits = (output.argmax(1) == target) & counts  # [B, ...]
    if bool(counts.all()):
        return hits.float() if hits.ndim == 1 else hits.float().flatten(1).mean(1)  # [B]
    number = counts.reshape(len(target), -1).sum(1)  # [B]
    if not bool((number > 0).all()):
        raise TaskError(
            f"accuracy: all targets of a sample are {IGNORED}, so it has no score. Leave out such samples, "
            "or give metric='token_accuracy', which counts positions and not samples."
        )
    return hits.reshape(len(target), -1).sum(1) / number


def fitting(who: str, output: Any, target: Any) -> Tensor:
    """Which positions count, bool of the target's shape; TaskError if output and target do not fit."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise TaskError(f"{who}: needs two tensors, got {shapes(output)} and {shapes(target)}; give metric=")
    if output.ndim < 2 or output.shape[:1] + output.shape[2:] != target.shape or target.is_floating_point():
        raise TaskError(
            f"{who}: output {shapes(output)} and target {shapes(target)} do not fit: it needs scores "
            "[B, K] and class numbers [B], or [B, K, ...] and [B, ...]. Give the task a metric= of its own."
        )
    counts = target != IGNORED
    real = target[counts]
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < output.shape[1]:
        raise TaskError(
            f"{who}: targets from {int(real.min())} to {int(real.max())}, but the model scores "
            f"{output.shape[1]} classes, 0 to {output.shape[1] - 1}. {IGNORED} marks targets that do not "
            f"count: Task(target=...) can change another number to it."
        )
    return counts


def right_positions(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2]: positions that are right, positions that count."""
    counts = fitting("token_accuracy", output, target)
    return by_sample((output.argmax(1) == target) & counts, counts)


def negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2]: sum of -log p(target), positions that count."""
    counts = fitting("perplexity", output, target)
    nats = F.cross_entropy(output.float(), target.long(), ignore_index=IGNORED, reduction="none")
    return by_sample(nats, counts)


def class_overlap(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2 K]: positions of each class in both prediction and target, in either."""
    both, predicted, actual = confusion("mean_iou", output, target)
    return torch.cat([both, predicted + actual - both], 1)


def class_errors(output: Tensor, target: Tensor) -> Tensor:
    """[B, 3 K]: true positives, false positives and false negatives of each class."""
    both, predicted, actual = confusion("macro_f1", output, target)
    return torch.cat([both, predicted - both, actual - both], 1)


def confusion(who: str, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of each class by sample, [B, K] each: in prediction and target, in prediction, in target."""
    counts, samples, classes = fitting(who, output, target), output.shape[0], output.shape[1]
    begins = classes * torch.arange(samples, device=target.device).reshape(-1, *[1] * (target.ndim - 1))

    def histogram(labels: Tensor, where: Tensor) -> Tensor:
        found = torch.bincount((labels + begins)[where], minlength=samples * classes)
        return found.reshape(samples, classes).double()

    chosen = output.argmax(1)
    return (
        histogram(target, counts & (chosen == target)),
        histogram(chosen, counts),
        histogram(target, counts),
    )


def moments(output: Tensor, target: Tensor) -> Tensor:
    """[B, 6]: count, and sums of x, y, x^2, y^2, x y, for numbers x of the output and y of the target."""
    if (
        not isinstance(target, Tensor)
        or output.numel() != target.numel()
        or output.shape[0] != target.shape[0]
    ):
        raise TaskError(
            f"pearson: output {shapes(output)} and target {shapes(target)} do not fit: it needs as many "
            f"numbers of each"
        )
    x, y = (item.double().reshape(output.shape[0], -1) for item in (output, target))  # [B, n]
    return by_sample(torch.ones_like(x), x, y, x * x, y * y, x * y)


def by_sample(*places: Tensor) -> Tensor:
    """Sums over all positions of a sample, [B, S]."""
    return torch.stack([item.double().reshape(item.shape[0], -1).sum(1) for item in places], 1)


def over_classes(sums: Tensor, parts: int) -> tuple[Tensor, ...]:
    return sums.reshape(parts, -1).unbind()


def ratio(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


def mean_iou(sums: Tensor) -> Tensor:
    both, either = over_classes(sums, 2)
    return (both / either)[either > 0].mean()  # a class in neither prediction nor target has no IoU


def macro_f1(sums: Tensor) -> Tensor:
    hits, wrong, missed = over_classes(sums, 3)
    all_of = 2 * hits + wrong + missed
    return (2 * hits / all_of)[all_of > 0].mean()


def pearson(sums: Tensor) -> float:
    n, x, y, xx, yy, xy = sums.tolist()
    spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else math.nan


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", statistics=accuracy, percent=True, kind="classes"),
        Metric("token_accuracy", statistics=right_positions, value=ratio, percent=True, kind="classes"),
        Metric(
            "perplexity", statistics=negative_log_likelihood, value=lambda sums: ratio(sums).exp(),
            better="lower", kind="classes",
        ),
        Metric("mean_iou", statistics=class_overlap, value=mean_iou, percent=True, kind="classes"),
        Metric("macro_f1", statistics=class_errors, value=macro_f1, percent=True, kind="classes"),
        Metric("pearson", statistics=moments, value=pearson, kind="regression"),
    )
}  # fmt: skip


def metric_of(given: Any, who: str) -> Metric:
    """The Metric of a task's metric=: a name, a Metric, a torchmetrics object, or a function that returns one
    number a sample."""
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given in METRICS:
            return METRICS[given]
        raise TaskError(
            f"{who}: metric={given!r}; {did_you_mean(given, METRICS)}, or a function, or a tersor.Metric"
        )
    if is_torchmetric(given):
        return from_torchmetric(given)
    if not callable(given):
        raise TaskError(
            f"{who}: metric={given!r}, but it is a function, metric(output, target) -> one score a sample"
        )
    name = getattr(given, "__name__", "score")
    return Metric("score" if name == "<lambda>" else name, statistics=given)
