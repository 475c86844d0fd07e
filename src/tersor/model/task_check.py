"""Task check: check a model's output for the first batch and its loss; used by Task.check."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.dtypes import as_numbers
from tersor.errors import TaskError
from tersor.model.batches import shapes
from tersor.model.outputs import tensors_of


def check_answer(who: str, model: nn.Module, batch: Any, output: Any) -> None:
    """TaskError for NaN in the output if weights or batch hold NaN too: else it may be at padding only."""
    if not nan(output):
        return
    if nan(batch) or bad_weights(model):
        because = ": the batch holds NaN" if nan(batch) else bad_weights(model)
        raise TaskError(f"{who}: the model's output for the first batch is NaN{because}.")


def check_loss(who: str, model: nn.Module, loss: Any, fit: str) -> None:
    """TaskError for a loss that is not one finite number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(
            f"{who}: the loss returned {shapes(loss)}, but must return one number, a scalar tensor."
        )
    if not torch.isfinite(loss).all():
        raise TaskError(f"{who}: the loss is {loss.item()} on the first batch ({fit}){bad_weights(model)}.")


def nan(values: Any) -> bool:
    return any(bool(tensor.isnan().any()) for tensor in tensors_of(values) if tensor.is_floating_point())


def bad_weights(model: nn.Module) -> str:
    """The names of weights that are not finite, as the end of a sentence. Buffers may hold infinities: masks
    do."""
    bad = [name for name, value in model.named_parameters() if not as_numbers(value).isfinite().all()]
    bad += [name for name, value in model.named_buffers() if as_numbers(value).isnan().any()]
    names = f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}"
    return f": these weights are not finite: {names}" if bad else ""


def hint(model: nn.Module, batch: Any) -> str:
    """What a batch lacks for an encoder-decoder, as the end of a message; else ""."""
    if (
        not isinstance(batch, Mapping)
        or "decoder_input_ids" not in inspect.signature(model.forward).parameters
    ):
        return ""
    present = {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
    return "" if present else ". Without labels, it needs decoder_input_ids in the batch"
