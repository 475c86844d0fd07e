"""Decoder: what the decoder of an encoder-decoder is given, where the model makes it of the labels.

Hugging Face's T5, BART and Whisper shift the labels by one for it; a trace or an export of the model has no
labels and needs the outcome by name. Cost: one forward of those models, nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tersor.model.batches import evaluating

NAME = "decoder_input_ids"


def with_decoder(model: nn.Module, inputs: dict[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
    """The inputs, with the decoder's where the model makes them while it runs."""
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    get = getattr(model, "get_decoder", None)
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
