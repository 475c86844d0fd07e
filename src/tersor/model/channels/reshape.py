"""Reshape: labels through merging and splitting of dimensions.

[B, C, H, W] -> [B, C H W]       the array of C, repeated        one living axis: no table
[B, H D]     -> [B, H, D]        c[h, d]; h, d                    two: a table, of which the solver keeps one
Sizes of source and target are matched from the left into the smallest segments with equal products; in each,
dimensions are merged, then split. No label of several dimensions together is kept: it would tie what is only
implied. With rotary embeddings q[h, d] * cos[d] must tie d, not all heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tersor.model.channels.atoms import Array, Atoms, Label, alive, along


def merged(atoms: Atoms, axes: Sequence[Array]) -> Array:
    """The atoms of one dimension that merges these, slowest first."""
    if not axes:
        return atoms.dead("size 1")
    if len(axes) == 1:
        return axes[0]
    shape = [len(axis) for axis in axes]
    living = [k for k, axis in enumerate(axes) if alive(axis)]
    if len(living) <= 1:
        at = living[0] if living else 0
        return along(axes[at], at, shape).ravel().copy()
    cells = atoms.fresh(math.prod(shape))
    atoms.table(cells, axes)
    return cells


def parted(atoms: Atoms, whole: Array, sizes: Sequence[int]) -> list[Array]:
    """The atoms of the dimensions that this one is split into."""
    long = [n for n in sizes if n != 1]
    if len(long) <= 1:
        return [whole if n != 1 or not long else atoms.dead("size 1") for n in sizes]
    if not alive(whole):
        return [np.full(n, whole[0]) for n in sizes]
    cells, found = whole.reshape(sizes), []
    for k, n in enumerate(sizes):
        same = (cells == np.take(cells, [0], axis=k)).all()  # undoes a merge with a dead axis
        found.append(atoms.dead("repeated", n) if same and n != 1 else atoms.fresh(n))
    atoms.table(whole, found)
    return found


def reshaped(atoms: Atoms, label: Label, shape: Sequence[int]) -> Label:
    """The label of a tensor that is reshaped to `shape`."""
    if 0 in shape:
        return [atoms.dead("empty", n) for n in shape]
    found: Label = []
    for sources, sizes in segments([len(axis) for axis in label], list(shape)):
        inside = [label[k] for k in sources if len(label[k]) != 1]
        if not inside:
            found += [atoms.dead("size 1") for _ in sizes]
        elif sizes:
            found += parted(atoms, merged(atoms, inside), sizes)
    return found


def segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, list[int]]]:
    """(dimensions of the source, sizes of the target) for the smallest pieces with equal products."""
    i = j = 0
    while i < len(before) or j < len(after):
        start, first = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield range(start, i), list(after[first:j])
