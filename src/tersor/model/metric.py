"""Metrics: how good each sample's output is, by name.

accuracy[b] = 1 if argmax_k output[b, k] == target[b] else 0        larger is better; O(B * K)
One number a sample, not a mean: two models can then be compared in pairs, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tersor.errors import TaskError
from tersor.model.batches import shapes


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest of the K outputs is the target, else 0; the mean where there are many positions.

    output [B, K] or [B, K, ...] (as cross_entropy has it), target [B] or [B, ...] in 0..K-1; [B] float32.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise TaskError(
            f"accuracy: needs two tensors, got {shapes(output)} and {shapes(target)}; give metric="
        )
    if output.ndim < 2 or output.shape[:1] + output.shape[2:] != target.shape or target.is_floating_point():
        raise TaskError(
            f"accuracy: output {shapes(output)} and target {shapes(target)} do not fit: it needs scores "
            "[B, K] and class numbers [B], or [B, K, ...] and [B, ...]. Give the task a metric= of its own."
        )
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < output.shape[1]:
        raise TaskError(
            f"accuracy: targets from {int(target.min())} to {int(target.max())}, but the model scores "
            f"{output.shape[1]} classes, 0 to {output.shape[1] - 1}."
        )
    hits = (output.argmax(1) == target).float()  # [B, ...]
    return hits if hits.ndim == 1 else hits.flatten(1).mean(1)  # [B]


METRICS: dict[str, Callable[[Any, Any], Tensor]] = {"accuracy": accuracy}
