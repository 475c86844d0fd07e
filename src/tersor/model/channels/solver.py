"""Solver: from labels and their relations to components, and to the fate of each.

1  components of all edges; a frozen member freezes its component, the earliest reason is kept
2  to a fixed point over tables: a frozen cell freezes its slice on every axis; a table with one living axis
   is edges; with none, its cells are frozen
3  a table with two living axes or more is ambiguous: heads or their width, groups or their width. Tables that
   share components on an axis form a class; a whole class keeps its outer axis, or its inner one if that
   leaves more cells alive. The other axes are frozen. Again from 2.
Cost: near linear in the number of atoms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tersor.model.channels.atoms import DEAD, Array, Atoms, Table, along

POLICY = "the other side of a reshape is cut"


@dataclass(frozen=True)
class Solution:
    """Components of atoms, and why those are frozen that are."""

    component: Array  # of each atom
    frozen: Array  # of each component: the dead atom that says why, or -1

    def of(self, atoms: Array) -> Array:
        return self.frozen[self.component[atoms]]


def solve(
    atoms: Atoms, *, exact: bool, rigid: Collection[str] = (), still: Iterable[tuple[Array, str]] = ()
) -> Solution:
    """`exact`: freeze what is flagged. `rigid`: operators whose tables are frozen whole. `still`: more atoms
    to freeze, with reasons."""
    start = components(atoms.edges, atoms.count)
    frozen = np.full(int(start.max(initial=-1)) + 1, -1)
    frozen[start[:DEAD]] = np.arange(DEAD)
    now = Solution(start, frozen)
    for array, dead in atoms.freezes:
        freeze(now, array, dead)
    for array, reason in still:
        freeze(now, array, atoms.number(reason))
    if exact:
        for array, reason in atoms.flags:
            freeze(now, array, atoms.number(f"{reason} counts it"))
    tables = list(atoms.tables)
    for table in tables:
        if table.node in rigid:
            for array in (table.cells.ravel(), *table.axes):
                freeze(now, array, atoms.number("a width that the code fixes"))
    policy = atoms.number(POLICY)
    now, tables = settled(now, tables)
    while tables:
        kinds = classes(now, tables)
        tried = {}
        for side in ("outer", "inner"):
            trial, _ = settled(chosen(now, tables, dict.fromkeys(kinds, side), kinds, policy), tables)
            tried[side] = [sum(spared(trial, tables[k].cells) for k in members) for members in kinds.values()]
        sides = {
            kind: "inner" if inner > outer else "outer"
            for kind, outer, inner in zip(kinds, tried["outer"], tried["inner"], strict=True)
        }
        now, tables = settled(chosen(now, tables, sides, kinds, policy), tables)
    return now


def components(edges: list[tuple[Array, Array]], count: int) -> Array:
    if not edges:
        return np.arange(count)
    a, b = (np.concatenate([edge[k] for edge in edges]) for k in (0, 1))
    from scipy.sparse import (
        coo_matrix,
    )  # a quarter of a second, which commands that cut nothing need not wait
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(a), bool), (a, b)), shape=(count, count))
    found: Array = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def freeze(now: Solution, atoms: Array, dead: int) -> None:
    """Freeze the components of these atoms that are still free."""
    found = now.component[atoms]
    now.frozen[found[now.frozen[found] < 0]] = dead


def settled(now: Solution, tables: list[Table]) -> tuple[Solution, list[Table]]:
    """The fixed point over tables, and those that are still ambiguous. `now` is not changed."""
    now, changed = replace(now, frozen=now.frozen.copy()), True
    while changed:
        changed, rest, edges = False, [], []
        for table in tables:
            cells = now.of(table.cells)
            for k, axis in enumerate(table.axes):
                others = tuple(j for j in range(len(table.axes)) if j != k)
                worst = cells.max(axis=others)  # a frozen cell keeps its slice
                hit = (worst >= 0) & (now.of(axis) < 0)
                if hit.any():
                    now.frozen[now.component[axis[hit]]] = worst[hit]
                    changed = True
            living = living_axes(now, table)
            if not living:
                free = now.of(table.cells) < 0
                if free.any():
                    now.frozen[now.component[table.cells[free]]] = now.of(table.axes[0]).max()
                    changed = True
            elif len(living) == 1:
                axis = along(table.axes[living[0]], living[0], table.cells.shape)
                edges.append((now.component[table.cells].ravel(), now.component[axis].ravel()))
                changed = True
            else:
                rest.append(table)
        tables = rest
        if edges:
            merged = components(edges, len(now.frozen))
            frozen = np.full(int(merged.max()) + 1, -1)
            held = now.frozen >= 0
            frozen[merged[held]] = now.frozen[held]
            now = Solution(merged[now.component], frozen)
    return now, tables


def spared(now: Solution, cells: Array) -> int:
    """How many of these cells may still be cut. None, if all of them only together."""
    free = now.component[cells[now.of(cells) < 0]]
    return len(free) if len(np.unique(free)) > 1 else 0


def living_axes(now: Solution, table: Table) -> list[int]:
    return [k for k, axis in enumerate(table.axes) if (now.of(axis) < 0).any()]


def classes(now: Solution, tables: list[Table]) -> dict[int, list[int]]:
    """Tables that share a living component on any axis, by the number of their class."""
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    for number, table in enumerate(tables):
        for axis in table.axes:
            found = now.component[axis]
            found = np.unique(found[now.frozen[found] < 0])
            rows.append(np.full(len(found), number))
            columns.append(found + len(tables))
    labels = components(list(zip(rows, columns, strict=True)), len(tables) + len(now.frozen))
    found_classes: dict[int, list[int]] = {}
    for number in range(len(tables)):
        found_classes.setdefault(int(labels[number]), []).append(number)
    return found_classes


def chosen(
    now: Solution, tables: list[Table], sides: dict[int, str], kinds: dict[int, list[int]], policy: int
) -> Solution:
    """Every class keeps its outer or inner living axis; the others are frozen."""
    after = replace(now, frozen=now.frozen.copy())
    for kind, members in kinds.items():
        for number in members:
            living = living_axes(after, tables[number])  # a table before it may have frozen one already
            if len(living) < 2:
                continue
            keep = living[0 if sides[kind] == "outer" else -1]
            for k in living:
                if k != keep:
                    freeze(after, tables[number].axes[k], policy)
    return after
