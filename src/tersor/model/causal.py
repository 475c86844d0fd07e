"""Causal: whether the scores at a token predict the next token, so that labels must be shifted by one.

Hugging Face's causal language models take their inputs as labels and shift them in their own loss. If the
model did not get the labels (another loss, a wrapper without labels), the labels in the batch are still the
inputs, not shifted. Without a shift here, a model would score well by copying its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.model.logits import IGNORED, Logits
from tersor.model.outputs import own_loss


def causal(output: Any, target: Any, batch: Any = None) -> bool:
    """Whether the target of a causal model's output is its unshifted input: the model computed its own loss
    from it, or the target equals `input_ids` at every token that counts."""
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
    """Scores [B, T, K] aligned with the next tokens: (scores, target, mask) of T - 1 tokens. Anything that is
    not one class per token is returned unchanged."""
    if logits.kind != "classes" or logits.places != target.shape:
        return logits, target, mask
    scores = Logits(logits.scores[:, :, :-1], "classes")
    return scores, target[:, 1:], mask[:, 1:] if mask is not None else None
