"""Causal: whether the scores at one token are of the next one, so that labels lie a place further on.

Hugging Face's causal language models take their inputs as labels and move them themselves, in their own loss.
Where they were given none (a loss of one's own, a wrapper that names no labels), the labels in the batch are
the same, and nothing has moved them: compared as they lie, a model would be praised for copying its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.model.logits import IGNORED, Logits
from tersor.model.outputs import own_loss


def causal(output: Any, target: Any, batch: Any = None) -> bool:
    """Whether the target of a causal model's answer is its input, not moved: it has computed its loss from
    it, or the target is `input_ids` wherever it counts."""
    if "CausalLM" not in type(output).__name__ or not isinstance(target, Tensor) or target.ndim != 2:
        return False
    if own_loss(output) is not None:
        return True
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(inputs, Tensor) or inputs.shape != target.shape:
        return False
    counts = target != IGNORED
    return bool(counts.any()) and bool((target == inputs)[counts].all())


def moved(logits: Logits, target: Tensor, mask: Tensor | None) -> tuple[Logits, Tensor, Tensor | None]:
    """Scores of next tokens [B, T, K] with the tokens that they are of, and which of these count."""
    if logits.kind != "classes" or logits.places != target.shape:
        return logits, target, mask
    scores = Logits(logits.scores[:, :, :-1], "classes")
    return scores, target[:, 1:], mask[:, 1:] if mask is not None else None
