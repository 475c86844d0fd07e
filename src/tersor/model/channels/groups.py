"""Groups: the units of a model (channels, heads, neurons) and the families that they are ranked in.

unit      one component of atoms: the slices of tensors that are removed together
family    the units with the same slices: one (tensor, axis) for each, with the same number of indices
exact     removing a unit is the same as setting it to zero; flagged: a normalizer counts it as well
From one trace of the model's forward (walk.py, solver.py). Cost: the trace, and less than a second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from tersor.errors import RefusedError
from tersor.model.channels.atoms import DEAD, Array, alive, along
from tersor.model.channels.solver import Solution, components, solve
from tersor.model.channels.walk import Walk
from tersor.model.graph import Graph, Inputs, traced


class Slices(NamedTuple):
    """The indices of each unit along one axis of one tensor."""

    tensor: str  # a parameter or buffer, by its first name
    axis: int
    at: Array  # the indices, [U, K]


@dataclass(frozen=True, eq=False)
class Family:
    """Units that are alike, U of them."""

    name: str  # of its first tensor and axis: "layer1.0.conv1.weight:0"
    slices: tuple[Slices, ...]
    units: Array  # [U], their components
    flags: tuple[str, ...] = ()  # the normalizers that count these units; none: exact

    @property
    def size(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Groups:
    """The families of a model, and what is frozen."""

    walk: Walk
    solution: Solution
    families: tuple[Family, ...]

    @property
    def graph(self) -> Graph:
        return self.walk.graph

    def kept(self, atoms: Array, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of these atoms stay, for a mask of removed components."""
        return ~gone[self.solution.component[atoms]]

    def removed(self, units: Iterable[Array]) -> NDArray[np.bool_]:
        """The mask of components for units, given by their components."""
        gone = np.zeros(len(self.solution.frozen), bool)
        for some in units:
            gone[some] = True
        return gone

    def cuts(self, gone: NDArray[np.bool_]) -> dict[tuple[str, int], Array]:
        """(tensor, axis) -> the indices that stay, for each axis from which any is removed."""
        found = {}
        for name, label in self.walk.tensors.items():
            for axis, atoms in enumerate(label):
                kept = self.kept(atoms, gone)
                if not kept.all():
                    found[name, axis] = np.flatnonzero(kept)
        return found

    def why_frozen(self, tensor: str, axis: int) -> dict[str, int]:
        """The reasons of the indices of an axis that cannot be cut, with their counts."""
        dead = self.solution.of(self.walk.tensors[tensor][axis])
        numbers, counts = np.unique(dead[dead >= 0], return_counts=True)
        reasons = self.walk.atoms.reasons
        return {reasons[n]: int(count) for n, count in zip(numbers, counts, strict=True)}

    def stays(self, tensors: Iterable[str]) -> dict[str, int]:
        """How many indices of these tensors stay, by the reason, the most frequent first."""
        found: dict[str, int] = {}
        for name in tensors:
            for axis in range(len(self.walk.tensors.get(name, ()))):
                for reason, count in self.why_frozen(name, axis).items():
                    found[reason] = found.get(reason, 0) + count
        for reason in ("size 1", "kernel"):  # of no unit
            found.pop(reason, None)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def nodes(self) -> list[fx.Node]:
        return [node for node in self.walk.labels if node.op == "call_function"]


def groups_of(
    walk: Walk, *, exact: bool = True, rigid: Collection[str] = (), still: Iterable[tuple[Array, str]] = ()
) -> Groups:
    """The groups of a walked graph. `exact`: only units whose removal equals a zero. `rigid` and `still`:
    see solver.solve."""
    solution = solve(walk.atoms, exact=exact, rigid=rigid, still=still)
    of, size = solution.component, len(solution.frozen)
    random = np.random.default_rng(0)
    signature, learned = np.zeros(size, np.uint64), np.zeros(size, bool)
    parameters = set(walk.graph.program.graph_signature.parameters)
    places: list[tuple[str, int, Array]] = []
    for name, label in walk.tensors.items():
        for axis, atoms in enumerate(label):
            if alive(atoms):
                places.append((name, axis, atoms))
                np.add.at(signature, of[atoms], random.integers(0, 2**63, dtype=np.uint64))
                if own_parameter(name, parameters):
                    learned[of[atoms]] = True
    units = np.flatnonzero((solution.frozen < 0) & learned)
    _, inverse = np.unique(signature[units], return_inverse=True)
    number, rank = np.full(size, -1), np.zeros(size, np.int64)
    number[units] = inverse
    members: dict[int, Array] = {}
    for k in np.unique(inverse):
        members[int(k)] = units[inverse == k]
        rank[members[int(k)]] = np.arange(len(members[int(k)]))
    slices: dict[int, list[Slices]] = {k: [] for k in members}
    for name, axis, atoms in places:
        mine = number[of[atoms]]
        for k in np.unique(mine[mine >= 0]):
            at = np.flatnonzero(mine == k)
            order = np.argsort(rank[of[atoms[at]]], kind="stable")
            slices[int(k)].append(Slices(name, axis, at[order].reshape(len(members[int(k)]), -1)))
    flags: dict[int, list[str]] = {k: [] for k in members}
    for atoms, reason in walk.atoms.flags:
        for k in np.unique(number[of[atoms]]):
            if k >= 0 and reason not in flags[int(k)]:
                flags[int(k)].append(reason)
    families = [
        Family(f"{slices[k][0].tensor}:{slices[k][0].axis}", tuple(slices[k]), members[k], tuple(flags[k]))
        for k in members
    ]
    place = {name: at for at, name in enumerate(walk.tensors)}
    families.sort(key=lambda f: (place[f.slices[0].tensor], f.slices[0].axis, int(f.slices[0].at.min())))
    return Groups(walk, solution, tuple(unique(families)))


def removal(walk: Walk, cuts: Mapping[tuple[str, int], Array]) -> tuple[Groups, NDArray[np.bool_]]:
    """What these cuts remove, without any choice of axes: (groups without families, the mask of components).
    The mask cuts more than was asked if the cuts leave out slices of their units."""
    of = components(walk.atoms.edges, walk.atoms.count)
    groups = Groups(walk, Solution(of, np.full(int(of.max()) + 1, -1)), ())
    gone = np.zeros(len(groups.solution.frozen), bool)
    for (name, axis), kept in cuts.items():
        lost = np.ones(len(walk.tensors[name][axis]), bool)
        lost[kept] = False
        gone[of[walk.tensors[name][axis][lost]]] = True
    seen = -1
    while seen < gone.sum():
        seen = int(gone.sum())
        for cells, axes, _ in walk.atoms.tables:
            for k, side in enumerate(axes):  # a cell is gone with any of its axes, an axis with all its cells
                gone[of[cells[along(gone[of[side]], k, cells.shape)]]] = True
                others = tuple(j for j in range(len(axes)) if j != k)
                gone[of[side[np.all(gone[of[cells]], axis=others)]]] = True
        gone[of[:DEAD]] = False
    return groups, gone


def unique(families: list[Family]) -> Iterable[Family]:
    """Families with names of their own: several may begin at one axis of one tensor."""
    seen: dict[str, int] = {}
    for family in families:
        count = seen[family.name] = seen.get(family.name, 0) + 1
        name = family.name if count == 1 else f"{family.name}/{count}"
        yield Family(name, family.slices, family.units, family.flags)


def own_parameter(name: str, parameters: Collection[str]) -> bool:
    return name in parameters or f"model.{name}" in parameters


def walked(model: nn.Module, inputs: Inputs, stored: Collection[str]) -> Walk:
    """The labels of a model's graph; `stored`: names of the tensors in its state dict that may be cut.
    RefusedError if it cannot be traced."""
    graph = traced(model, inputs)
    if not set(graph.unread) & set(dict(model.named_parameters())) & set(stored):
        return Walk(graph, stored)
    try:
        return Walk(graph, stored, traced(model, inputs, training=True))
    except RefusedError:  # it may have loss terms that need labels
        return Walk(graph, stored)
