"""Metrics by name, all of classes but one; -100 marks a target that does not count.

accuracy         share of the places of a sample whose largest score is the target's; the mean of samples
token_accuracy   the same, of all places of the set together
perplexity       exp(mean of -log p(target)) over all places                           lower is better
mean_iou         mean over classes of |both| / |either|, places of the whole set       Everingham 2010
macro_f1         mean over classes of 2 tp / (2 tp + fp + fn)                          van Rijsbergen 1979
pearson          correlation of outputs and targets, all numbers of the set            Pearson 1895
Cost: O(B * K) a batch; mean_iou and macro_f1 keep 2 and 3 numbers a class and sample.
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
from tersor.model.metric import Metric, counted, counts_up


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest of the K outputs is the target, else 0; the mean where there are many positions.

    output [B, K] or [B, K, ...] (as cross_entropy has it), target [B] or [B, ...] in 0..K-1; [B] float32.
    """
    counts = fitting("accuracy", output, target)
    hits = (output.argmax(1) == target) & counts  # [B, ...]
    if bool(counts.all()):
        return hits.float() if hits.ndim == 1 else hits.float().flatten(1).mean(1)  # [B]
    number = counts.reshape(len(target), -1).sum(1)  # [B]
    if not bool((number > 0).all()):
        raise TaskError(
            f"accuracy: a sample has no target but {IGNORED}, so it has no score. Leave such samples out, or "
            "give metric='token_accuracy', which counts places and not samples."
        )
    return hits.reshape(len(target), -1).sum(1) / number


def fitting(who: str, output: Any, target: Any) -> Tensor:
    """Which places count, bool of the target's shape; TaskError where output and target do not fit."""
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
            f"{output.shape[1]} classes, 0 to {output.shape[1] - 1}. Places that do not count are {IGNORED}: "
            f"Task(target=...) can make another number that."
        )
    return counts


def right(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2]: places that are right, places that count."""
    counts = fitting("token_accuracy", output, target)
    return by_sample((output.argmax(1) == target) & counts, counts)


def surprise(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2]: sum of -log p(target), places that count."""
    counts = fitting("perplexity", output, target)
    nats = F.cross_entropy(output.float(), target.long(), ignore_index=IGNORED, reduction="none")
    return by_sample(nats, counts)


def overlap(output: Tensor, target: Tensor) -> Tensor:
    """[B, 2 K]: places of each class in both, in either of prediction and target."""
    both, said, meant = confusion("mean_iou", output, target)
    return torch.cat([both, said + meant - both], 1)


def errors(output: Tensor, target: Tensor) -> Tensor:
    """[B, 3 K]: true positives, false positives and false negatives of each class."""
    both, said, meant = confusion("macro_f1", output, target)
    return torch.cat([both, said - both, meant - both], 1)


def confusion(who: str, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places of each class by sample, [B, K] each: in prediction and target, in prediction, in target."""
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
    """[B, 6]: how many numbers x of the output and y of the target, sums of x, y, x^2, y^2, x y."""
    if (
        not isinstance(target, Tensor)
        or output.numel() != target.numel()
        or output.shape[0] != target.shape[0]
    ):
        raise TaskError(
            f"pearson: output {shapes(output)} and target {shapes(target)} do not fit: as many of each"
        )
    x, y = (item.double().reshape(output.shape[0], -1) for item in (output, target))  # [B, n]
    return by_sample(torch.ones_like(x), x, y, x * x, y * y, x * y)


def by_sample(*places: Tensor) -> Tensor:
    """Sums over all places of a sample, [B, S]."""
    return torch.stack([item.double().reshape(item.shape[0], -1).sum(1) for item in places], 1)


def over_classes(sums: Tensor, parts: int) -> tuple[Tensor, ...]:
    return sums.reshape(parts, -1).unbind()


def share(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


def mean_iou(sums: Tensor) -> Tensor:
    both, either = over_classes(sums, 2)
    return (both / either)[either > 0].mean()  # a class that nobody speaks of has no IoU


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
        Metric("token_accuracy", statistics=right, value=share, percent=True, kind="classes"),
        Metric(
            "perplexity", statistics=surprise, value=lambda sums: share(sums).exp(), better="lower",
            kind="classes",
        ),
        Metric("mean_iou", statistics=overlap, value=mean_iou, percent=True, kind="classes"),
        Metric("macro_f1", statistics=errors, value=macro_f1, percent=True, kind="classes"),
        Metric("pearson", statistics=moments, value=pearson, kind="regression"),
    )
}  # fmt: skip


def metric_of(given: Any, who: str) -> Metric:
    """What a task's metric= means: a name, a Metric, an object of torchmetrics, or a function that gives one
    number a sample."""
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given in METRICS:
            return METRICS[given]
        raise TaskError(
            f"{who}: metric={given!r}; {did_you_mean(given, METRICS)}, or a function, or a tersor.Metric"
        )
    if counts_up(given):
        return counted(given)
    if not callable(given):
        raise TaskError(
            f"{who}: metric={given!r}, but it is a function, metric(output, target) -> one score a sample"
        )
    name = getattr(given, "__name__", "score")
    return Metric("score" if name == "<lambda>" else name, statistics=given)
