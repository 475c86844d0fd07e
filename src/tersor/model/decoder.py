"""Decoder: the decoder inputs of an encoder-decoder model that computes them from the labels.

Hugging Face's T5, BART and Whisper shift the labels by one to get them. A trace or an export of the model has
no labels, so it needs `decoder_input_ids` itself. Cost: one forward of such a model, nothing for others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tersor.model.batches import evaluating

NAME = "decoder_input_ids"


def with_decoder(model: nn.Module, inputs: dict[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
    """The inputs, with `decoder_input_ids` added if the model computes them during `run`."""
    decoder = decoder_of(model)
    if NAME in inputs or "decoder_inputs_embeds" in inputs or decoder is None:
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


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of a model that takes its inputs; None for others. The encoder-decoder may be inside of a
    wrapper: a model with grids or codes is one."""
    taken = inspect.signature(model.forward).parameters
    if NAME not in taken and all(item.kind is not inspect.Parameter.VAR_KEYWORD for item in taken.values()):
        return None
    for module in model.modules():
        get: Any = getattr(module, "get_decoder", None)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and callable(get):
            found = get()
            return found if isinstance(found, nn.Module) else None
    return None
