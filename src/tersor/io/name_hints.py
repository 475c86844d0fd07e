"""Name hints: guess the kinds of a weights file's tensors from names, shapes and dtypes, without a module.

The rules are few and cautious. A tensor that is mistaken for a weight is compressed, and a network with
pruned scales or masks is useless. A note lists the tensors that stay unchanged because of a rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tersor.errors import few
from tersor.forms import Dense
from tersor.io.header import Slot
from tersor.model.sites import Site

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
# Other buffers that networks keep in their state dicts.
BUFFERS = re.compile(r"(^|[._])(masked_bias|position_ids|token_type_ids|relative_position_index|attn_mask)$")
# Scales and zero points of quantized checkpoints: GPTQ, AWQ, bitsandbytes, float8.
SCALES = re.compile(
    r"(^|[._])(scales?|scale_inv|scales_and_zeros|zeros|qzeros|zero_points?|absmax|quant_map|nested_absmax"
    r"|nested_quant_map)$"
)
PACKED = re.compile(r"(^|[._])(qweight|qzeros|g_idx|weight_packed|q_weight)$")
LIMIT = 8  # names per kind in a note


def describe(name: str, slot: Slot) -> Site:
    """The site of a tensor in a weights file; its kind is a guess from name, shape and dtype."""
    dtype, axes = str(slot.dtype).removeprefix("torch."), len(slot.shape)
    long = sum(size > 1 for size in slot.shape)
    kind = "other"
    if name.endswith(RUNNING) or BUFFERS.search(name) or (PACKED.search(name) and is_integer(slot.dtype)):
        kind = "buffer"
    elif slot.dtype.is_floating_point and SCALES.search(name):
        kind = "scale"
    elif slot.dtype.is_floating_point and (axes == 2 or (3 <= axes <= 5 and long > 1)):
        kind = "linear" if axes == 2 else "conv"
    return Site(name, slot.shape, dtype, kind, layer=name.rpartition(".")[0])


def is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def is_mask(tensor: Tensor) -> bool:
    """Only zeros and infinities: an attention mask or an unused range observer, not a broken weight."""
    return bool((tensor.isinf() | (tensor == 0)).all() and tensor.isinf().any())


def is_causal(form: Dense) -> bool:
    """Lower triangle of ones, [1, 1, N, N]: the causal mask, which GPT-2 stores as attn.bias."""
    shape = tuple(form.shape)
    if len(shape) != 4 or shape[:2] != (1, 1) or shape[2] != shape[3] or shape[2] < 2:
        return False  # decided by shape: reading a large tensor is slow
    tensor = form.array[0, 0]
    return torch.equal(tensor, torch.ones_like(tensor).tril())


def left_alone(sites: Mapping[str, Site], changed: Collection[str]) -> dict[str, list[str]]:
    """Names of the tensors that stay unchanged because of their name, shape or values, by kind."""
    found: dict[str, list[str]] = {}
    for name, site in sites.items():
        if name in changed or 0 in site.shape:
            continue
        if name.endswith(RUNNING):
            found.setdefault("running statistics", []).append(name)
        elif site.kind in ("scale", "mask", "buffer"):
            found.setdefault("packed" if PACKED.search(name) else site.kind, []).append(name)
        elif len(site.shape) > 1 and site.floating and not site.is_weight:
            found.setdefault("one long axis", []).append(name)
    return found


def left_text(left: Mapping[str, list[str]]) -> str:
    """left_alone() as a ledger note, without running statistics, which no run compresses."""
    words = [f"{kind}: {few(names, LIMIT)}" for kind, names in left.items() if kind != "running statistics"]
    return f"left as it is: {'; '.join(words)}" if words else ""
