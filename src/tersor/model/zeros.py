"""Zeros: which weights came with zeros that somebody put there, as masks that keep them.

A trained float is exactly zero about never: a pruned weight, the row of a padding token, a block that was cut
are. Without a mask the next step would move them. Not taken for such: a few zeros among thousands, what a
narrow dtype rounds to zero, and a tensor as it begins (all zeros, an identity, a fixed filter), which is to
be trained.
Cost: one pass over a weight, a slice at a time; where there are zeros another, and a byte an element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tersor.forms import Coded, Dense, Form, Masked
from tersor.model.sites import Site, select

RARE = 1000  # one zero in so many is no decision, unless a whole index of an axis is empty
FEW = 3  # magnitudes: a tensor with fewer of them was never trained
HELD = "it came with zeros, which a mask holds"  # what is said of such a weight
NONE = "none"  # in place of a glob: no weight keeps its zeros


def masked(
    sites: Mapping[str, Site], forms: Mapping[str, Form], zeros: str = "*", where: str | Iterable[str] = "*",
    who: str = "zeros",
) -> dict[str, Masked]:  # fmt: skip
    """The weights that `zeros` and `where` mean and that came with zeros, under masks of these.

    SiteError where `zeros` matches nothing, and in the name of `who` where `where` does.
    """
    if zeros == NONE:
        return {}
    meant = None if zeros == "*" else {site.name for site in select(sites, zeros, "zeros")}
    plain = {
        name: form for name, form in forms.items()
        if sites[name].is_weight and isinstance(form, (Dense, Coded)) and (meant is None or name in meant)
    }  # fmt: skip
    if where != "*" and plain:
        chosen = {site.name for site in select(sites, where, who)}
        plain = {name: form for name, form in plain.items() if name in chosen}
    keeps = {name: kept(form) for name, form in plain.items()}
    return {name: Masked(Dense(keep), plain[name]) for name, keep in keeps.items() if keep is not None}


def kept(form: Form) -> Tensor | None:
    """Where a weight is not zero, bool of its shape; None where its zeros are no decision."""
    count = math.prod(form.shape)
    zeros = count - sum(int(part.count_nonzero()) for part in form.slices())
    if zeros < 2 or not trained(form, zeros):
        return None
    keep = torch.cat([part != 0 for part in form.slices()]).reshape(tuple(form.shape))
    return keep if zeros * RARE > count or emptied(keep) else None


def trained(form: Form, zeros: int) -> bool:
    """Whether what is not zero has been trained, and is not so small that its dtype rounds to zero.

    Where rounding (or a processor that flushes) makes zeros, it leaves about as many weights just above them.
    """
    small, sizes = 0, set[float]()
    for part in form.slices():
        size = part.abs()
        size = size[size > 0]
        small += int((size < 2 * torch.finfo(size.dtype).smallest_normal).sum())
        if len(sizes) < FEW:
            sizes.update(size.unique()[:FEW].tolist())
    return len(sizes) >= FEW and zeros > small


def emptied(keep: Tensor) -> bool:
    """Whether all is zero at an index of an axis: a row of an embedding, an input of a layer."""
    for axis in range(keep.ndim):
        rows = keep.movedim(axis, 0).flatten(1)
        if rows.shape[1] > 1 and not bool(rows.any(1).all()):
            return True
    return False
