"""Given masks: masks for the zeros of weights that were pruned before they were given.

A trained float is almost never exactly zero: zeros are pruned weights, the row of a padding token, a block
that was cut. Without a mask the next step would change them. Not masked: a few zeros among thousands, values
that a narrow dtype rounds to zero, and initial tensors (all zeros, an identity, a fixed filter), which are
still to be trained.
Cost: one pass over a weight, a slice at a time; another one and a byte an element if it has zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tersor.forms import Coded, Dense, Form, Masked
from tersor.model.sites import Site, select

RARE = 1000  # fewer than one zero in RARE is chance, unless a whole index of an axis is zero
FEW = 3  # a tensor with fewer different magnitudes was never trained
HELD = "it was given with zeros, which a mask keeps"  # the text of the note on such a weight
NONE = "none"  # instead of a glob: no weight keeps its zeros


def with_masks(
    sites: Mapping[str, Site], forms: Mapping[str, Form], zeros: str = "*", where: str | Iterable[str] = "*",
    who: str = "zeros",
) -> dict[str, Masked]:  # fmt: skip
    """The weights that `zeros` and `where` pick and that have zeros to keep, as Masked forms.

    SiteError if `zeros` matches nothing; in the name of `who` if `where` does.
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
    keeps = {name: keep_mask(form) for name, form in plain.items()}
    return {name: Masked(Dense(keep), plain[name]) for name, keep in keeps.items() if keep is not None}


def keep_mask(form: Form) -> Tensor | None:
    """Which elements of a weight are not zero, bool of its shape; None if its zeros need no mask."""
    count = math.prod(form.shape)
    zeros = count - sum(int(part.count_nonzero()) for part in form.slices())
    if zeros < 2 or not trained(form, zeros):
        return None
    keep = torch.cat([part != 0 for part in form.slices()]).reshape(tuple(form.shape))
    return keep if zeros * RARE > count or has_empty_index(keep) else None


def trained(form: Form, zeros: int) -> bool:
    """Whether the other elements were trained, and the zeros do not come from rounding in a narrow dtype.

    Rounding (or a processor that flushes to zero) leaves about as many tiny weights as zeros.
    """
    small, sizes = 0, set[float]()
    for part in form.slices():
        size = part.abs()
        size = size[size > 0]
        small += int((size < 2 * torch.finfo(size.dtype).smallest_normal).sum())
        if len(sizes) < FEW:
            sizes.update(size.unique()[:FEW].tolist())
    return len(sizes) >= FEW and zeros > small


def has_empty_index(keep: Tensor) -> bool:
    """Whether all elements at an index of an axis are zero: a row of an embedding, an input of a layer."""
    for axis in range(keep.ndim):
        rows = keep.movedim(axis, 0).flatten(1)
        if rows.shape[1] > 1 and not bool(rows.any(1).all()):
            return True
    return False
