"""Relation: what an edit says of the old form, and whether it is true.

wrap      the old form is a child of the new      refine   leaves replaced, the rest stands
lossless  decodes to the same bits                absorb   decoded and encoded anew: earlier structure is gone
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.dtypes import as_numbers
from tersor.forms import Form
from tersor.forms.form import as_bytes

HOW = ("wrap", "refine", "lossless", "absorb")


def untrue(how: str, before: Form, after: Form, dtype: torch.dtype) -> str:
    """Why this is no such edit of a site of this dtype; "" where it is one."""
    if how not in HOW:
        return f"an edit is one of {', '.join(HOW)}, not {how!r}"
    if tuple(after.shape) != tuple(before.shape):
        return f"shape {list(before.shape)} became {list(after.shape)}"
    if how == "wrap" and before.digest not in {node.digest for _, node in after.walk()}:
        return "a wrap must hold the old form"
    if how == "lossless":
        pairs = zip(before.slices(), after.slices(), strict=True)
        same = all(same_bits(old, new) for old, new in pairs)
        return "" if same else "a lossless edit must decode to the same bits"
    if not all(as_numbers(part.to(dtype)).isfinite().all() for part in after.slices()):
        return "the new form decodes to NaN or infinity; nothing was changed"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(torch.from_numpy(as_bytes(tensor)) for tensor in (a, b)))
