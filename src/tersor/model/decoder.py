"""Decoder: the decoder inputs of an encoder-decoder model that computes them from the labels.

Hugging Face's T5, BART and Whisper shift the labels by one to get them. A trace or an export of the model has
no labels, so it needs `decoder_input_ids` itself. Cost: one forward of such a model, nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tersor.model.batches import evaluating

NAME = "decoder_input_ids"


def with_decoder(model: nn.Module, inputs: dict[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
    """The inputs, with `decoder_input_ids` added if the model computes them during `run`."""
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if pair and callable(get) else None
    if NAME in inputs or "decoder_inputs_embeds" in inputs or not isinstance(decoder, nn.Module):
        return inputs
    seen: list[Any] = []
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("input_ids", args[0] if args else None)),
        with_kwargs=True,
    )
    try:
        with evaluating(model):
            run()
    finally:
        hook.remove()
    found = [ids for ids in seen if isinstance(ids, Tensor)]
    return {**inputs, NAME: found[0]} if found else inputs
