"""Relation: how an edit's new form relates to the old one, and the check of it.

wrap      the old form is a node of the new       refine   leaves are replaced, the structure stays
lossless  decodes to the same bits                absorb   decoded and encoded again: structure is lost
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.dtypes import as_numbers
from tersor.forms import Form
from tersor.forms.form import as_bytes

HOW = ("wrap", "refine", "lossless", "absorb")


def relation_error(how: str, before: Form, after: Form, dtype: torch.dtype) -> str:
    """Why `how` is wrong for this edit of a site of this dtype; "" if it is right."""
    if how not in HOW:
        return f"an edit is one of {', '.join(HOW)}, not {how!r}"
    if tuple(after.shape) != tuple(before.shape):
        return f"shape {list(before.shape)} became {list(after.shape)}"
    if how == "wrap" and before.digest not in {node.digest for _, node in after.walk()}:
        return "a wrap must contain the old form"
    if how == "lossless":
        pairs = zip(before.slices(), after.slices(), strict=True)
        same = all(same_bits(old, new) for old, new in pairs)
        return "" if same else "a lossless edit must decode to the same bits"
    if not all(as_numbers(part.to(dtype)).isfinite().all() for part in after.slices()):
        return "the new form decodes to NaN or infinity; nothing was changed"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(torch.from_numpy(as_bytes(tensor)) for tensor in (a, b)))
