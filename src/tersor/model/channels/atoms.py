"""Atoms: a label for every index of every dimension, and what operators say about labels.

atom    an integer; where two dimensions have the same atoms, their indices are cut together
dead    an atom below DEAD, one for each reason: its index is never cut
edge    two arrays of atoms of equal length: same fate; against a dead atom, a freeze
table   cells c and axes a, b: kept(c[i, j]) = kept(a[i]) and kept(b[j])      a reshape that merges or splits
flag    cutting the atom changes the function beyond setting it to zero: a normalizer counts it
Everything is appended while the graph is walked; the solver (solver.py) merges once, afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Label = list[Array]  # the label of a tensor: one array of atoms a dimension

DEAD = 4096  # ids below are dead; more reasons than that share the last


class Table(NamedTuple):
    """kept(cells[i, j, ...]) = kept(axes[0][i]) and kept(axes[1][j]) and ..."""

    cells: Array
    axes: tuple[Array, ...]
    node: str  # the operator that needs it


class Atoms:
    """All labels of one graph, and their relations."""

    def __init__(self) -> None:
        self.count = DEAD
        self.reasons: list[str] = []  # of the dead atoms
        self.edges: list[tuple[Array, Array]] = []
        self.freezes: list[tuple[Array, int]] = []  # atoms, dead atom
        self.tables: list[Table] = []
        self.flags: list[tuple[Array, str]] = []
        self.here = ""  # the operator at work, for tables

    def fresh(self, size: int) -> Array:
        """New atoms. A dimension of size 1 is dead: it may be squeezed or broadcast."""
        if size == 1:
            return self.dead("size 1")
        found = np.arange(self.count, self.count + size)
        self.count += size
        return found

    def dead(self, reason: str, size: int = 1) -> Array:
        return np.full(size, self.number(reason))

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            if len(self.reasons) == DEAD:
                return DEAD - 1
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def tie(self, a: Array, b: Array) -> None:
        """The same fate, index by index."""
        a, b = np.ravel(a), np.ravel(b)
        if len(a) != len(b):
            raise ValueError(f"{self.here}: {len(a)} and {len(b)} indices cannot be tied")
        both = (a >= DEAD) & (b >= DEAD) & (a != b)
        if both.any():
            self.edges.append((a[both], b[both]))
        for living, other in ((a, b), (b, a)):
            frozen = (living >= DEAD) & (other < DEAD)
            for dead in np.unique(other[frozen]):
                self.freezes.append((living[frozen & (other == dead)], int(dead)))

    def freeze(self, atoms: Array, reason: str) -> None:
        if (living := atoms[atoms >= DEAD]).size:
            self.freezes.append((living, self.number(reason)))

    def freeze_all(self, labels: Iterable[Label], reason: str) -> None:
        for label in labels:
            for atoms in label:
                self.freeze(atoms, reason)

    def flag(self, atoms: Array, reason: str) -> None:
        if (living := atoms[atoms >= DEAD]).size:
            self.flags.append((living, reason))

    def table(self, cells: Array, axes: Sequence[Array]) -> None:
        """kept(cells) = kept(each axis). Axes of size 1 are dropped; with one living axis it is edges."""
        axes = [axis for axis in axes if len(axis) != 1] or [self.dead("size 1")]
        cells = np.reshape(cells, [len(axis) for axis in axes])
        living = [k for k, axis in enumerate(axes) if alive(axis)]
        if not living:
            self.freeze(cells.ravel(), self.reasons[int(axes[0][0])])
        elif len(living) == 1:
            self.tie(cells, along(axes[living[0]], living[0], cells.shape))
        else:
            self.tables.append(Table(cells, tuple(axes), self.here))


def alive(atoms: Array) -> bool:
    """Whether any of them may be cut."""
    return bool((atoms >= DEAD).any())


def along(axis: Array, at: int, shape: Sequence[int]) -> Array:
    """The atoms of one axis, repeated over a whole table."""
    sizes = [1] * len(shape)
    sizes[at] = -1
    return np.broadcast_to(axis.reshape(sizes), shape)
