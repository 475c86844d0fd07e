"""Dead channels: units that can be cut without any change of the function, proved by NaN.

A cut of exact units equals zeros in all their slices (groups.py). So a unit is dead if the outputs do not
depend on the elements of its slices that are not zero already. NaN is put there, and the graph is evaluated:
outputs without NaN depend on none of them (model/nan_propagation.py).
Candidates are units that no product reads. They are tried all at once, then in halves where that fails.
Cost: one evaluation of the graph, and about 2 log2 U more for each candidate that is not dead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.errors import RefusedError
from tersor.model.channels.atoms import Array
from tersor.model.channels.groups import Family, Groups
from tersor.model.graph import floating
from tersor.model.nan_propagation import DEPENDS, Followed
from tersor.model.sites import Site

LEAST = 2  # units that stay in a family: a dimension of size 1 may be squeezed or broadcast
MOST = 400  # evaluations; what has not been tried by then stays


def dead_channels(
    groups: Groups, model: Followed, families: Collection[Family], sites: Mapping[str, Site]
) -> NDArray[np.bool_]:
    """The mask of components that may be cut from these families, all together. Some stay in each family."""
    units = np.concatenate(
        [unread(family, model.tensors, sites) for family in families] or [np.array([], int)]
    )
    gone, tried = groups.removed([]), 0
    queue = [units] if len(units) and known(model) else []
    while queue and tried < MOST:
        some, tried = queue.pop(), tried + 1
        trial = gone.copy()
        trial[some] = True
        if independent(groups, trial, model):
            gone = trial
        elif len(some) > 1:
            half = len(some) // 2
            queue += [some[half:], some[:half]]
    for family in families:
        dead = family.units[gone[family.units]]
        gone[dead[family.size - LEAST :]] = False  # none, unless fewer than LEAST would stay
    return gone


def unread(family: Family, tensors: Mapping[str, Tensor], sites: Mapping[str, Site]) -> Array:
    """The units whose columns are zero in all products that read them, by their components. None if no
    product does: attention's products read both of their factors."""
    live, products = np.zeros(family.size, bool), 0
    for tensor, axis, index in family.slices:
        site = sites[tensor]
        if site.contracted == axis and site.kind != "embedding":
            live |= nonzero(tensors[tensor], axis)[index].any(1)
            products += 1
    return family.units[~live & (products > 0)]


def nonzero(tensor: Tensor, axis: int) -> NDArray[np.bool_]:
    """Which indices of this axis have any element that is not zero."""
    found: NDArray[np.bool_] = (tensor != 0).movedim(axis, 0).flatten(1).any(1).cpu().numpy()
    return found


@torch.no_grad()
def independent(groups: Groups, gone: NDArray[np.bool_], model: Followed) -> bool:
    """Whether no output depends on the nonzero elements in the slices of these units."""
    saved: dict[str, Tensor] = {}
    try:
        for name, hit in slices_of(groups, gone, model.tensors):
            tensor = model.tensors[name]
            if (hit := hit & (tensor != 0)).any():
                if not tensor.is_floating_point():
                    return False
                saved[name] = tensor.detach().clone()
                tensor.masked_fill_(hit, torch.nan)
        return known(model)
    finally:
        for name, tensor in saved.items():
            model.tensors[name].copy_(tensor)


def known(model: Followed) -> bool:
    """Whether the outputs for the example are free of NaN."""
    try:
        outputs = model.outputs(model.leaves, lambda node, x, out: out)
    except RefusedError:  # a view, or a value of another dtype, would depend on a NaN
        return False
    return not any(x is DEPENDS or (floating(x) and bool(x.isnan().any())) for x in outputs)


@torch.no_grad()
def set_zero(
    groups: Groups, gone: NDArray[np.bool_], tensors: Mapping[str, Tensor], names: Collection[str]
) -> bool:
    """Zeros in the slices of these units, of the tensors with these names. Returns whether any changed."""
    changed = False
    for name, hit in slices_of(groups, gone, tensors):
        if name in names and bool((tensors[name][hit] != 0).any()):
            tensors[name].masked_fill_(hit, 0)
            changed = True
    return changed


def slices_of(
    groups: Groups, gone: NDArray[np.bool_], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with elements in slices of these units, and the mask of those."""
    for name, label in groups.walk.tensors.items():
        hit = torch.zeros(tensors[name].shape, dtype=torch.bool, device=tensors[name].device)
        for axis, atoms in enumerate(label):
            lost = np.flatnonzero(~groups.kept(atoms, gone))
            hit.index_fill_(axis, torch.from_numpy(lost).to(hit.device), True)
        if hit.any():
            yield name, hit
