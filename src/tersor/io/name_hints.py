"""Named: what the tensors of a weights file are for, by their names, shapes and dtypes: no module is there.

Rules are few and careful: what is taken for a weight by mistake is compressed as one, and a network whose
scales or masks are pruned answers nonsense. What stays as it is for such a rule is named in a note.
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
# Scales and offsets of weights that are quantized already: GPTQ, AWQ, bitsandbytes, float8 checkpoints.
SCALES = re.compile(
    r"(^|[._])(scales?|scale_inv|scales_and_zeros|zeros|qzeros|zero_points?|absmax|quant_map|nested_absmax"
    r"|nested_quant_map)$"
)
PACKED = re.compile(r"(^|[._])(qweight|qzeros|g_idx|weight_packed|q_weight)$")
LIMIT = 8  # names in a note, of each kind


def describe(name: str, slot: Slot) -> Site:
    """A site from what a weights file tells: no layer, so its kind is a guess from the shape."""
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
    """Nothing but zeros and infinities: a mask of attention, a range that saw no data; no broken weight."""
    return bool((tensor.isinf() | (tensor == 0)).all() and tensor.isinf().any())


def is_causal(form: Dense) -> bool:
    """Ones up to the diagonal and zeros after it, [1, 1, N, N]: GPT-2 keeps its mask so, as attn.bias."""
    shape = tuple(form.shape)
    if len(shape) != 4 or shape[:2] != (1, 1) or shape[2] != shape[3] or shape[2] < 2:
        return False  # without a look at its numbers: it may be large
    tensor = form.array[0, 0]
    return torch.equal(tensor, torch.ones_like(tensor).tril())


def left_alone(sites: Mapping[str, Site], changed: Collection[str]) -> dict[str, list[str]]:
    """What stayed as it is for what its name, shape or values say, by kind."""
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
    """The same for the ledger, which says nothing of running statistics: no run does."""
    words = [f"{kind}: {few(names, LIMIT)}" for kind, names in left.items() if kind != "running statistics"]
    return f"left as it is: {'; '.join(words)}" if words else ""
