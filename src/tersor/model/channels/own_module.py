"""Own module: cut the user's own module, as the graph says, and find what its code does not allow.

plan     cuts of tensors, from the groups; integers of the code (integers.py) and of grouped layers
check    the cut module runs, and each edge of its forward (watch.py) has the shape and the values of the cut
         graph (run_graph.py); this finds a scale that follows the width, or a literal in the code
fit      where the check fails, the reshapes of the module at fault are frozen, then all that its code names,
         then those of its parent, in every module of the class, until a trial cut of all families passes
Cost: one forward of the module and of the graph for each attempt; mostly one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tersor.errors import RefusedError, first_line
from tersor.model.batches import MISFIT, evaluating
from tersor.model.changes import Set
from tersor.model.channels.atoms import Array
from tersor.model.channels.call import tensors as labels_in
from tersor.model.channels.groups import Family, Groups, groups_of
from tersor.model.channels.integers import STOCK, Uses, literals, settings_of, uses_of
from tersor.model.channels.run_graph import GraphRun
from tersor.model.channels.walk import Walk
from tersor.model.graph import Inputs
from tersor.model.watch import WatchedRun, frame, holds_tensors, running

Cuts = Mapping[tuple[str, int], Array]  # (tensor, axis) -> indices that stay
Build = Callable[[Cuts, Sequence[Set]], nn.Module]  # a private copy of the model with these changes

TRIAL, SPREAD = 0.2, 0.2  # share of each family that the trial removes, and how far it differs
# Relative to an edge's largest value. Module and graph run the same kernels on the same shapes, mostly bit by
# bit alike; an attention scale that follows a cut width is off by 1e-2.
APART = 1e-4
ATTEMPTS = 40


class Plan(NamedTuple):
    """What a cut changes in the model."""

    cuts: dict[tuple[str, int], Array]
    sets: list[Set]


class Fault(NamedTuple):
    """Where the cut module differs from the cut graph."""

    path: str
    why: str


@dataclass
class OwnModule:
    """A model, its walked graph, and a way to build cut copies of it."""

    walk: Walk
    inputs: Inputs
    build: Build
    exact: bool = True
    rigid: set[str] = field(default_factory=set)  # operators whose reshapes are frozen
    still: list[tuple[Array, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # what did not work, in the order of the attempts
    uses: Uses = field(init=False)
    stock: frozenset[str] = field(init=False)  # layers of PyTorch's, by their paths

    def __post_init__(self) -> None:
        model = self.build({}, ())
        self.stock = frozenset(path for path, module in model.named_modules() if isinstance(module, STOCK))
        self.uses = uses_of(model, self.called)
        self.tensors = tensors_of(self.build({}, ()))

    def called(self, model: nn.Module) -> Any:
        with evaluating(model):
            return model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)

    @property
    def samples(self) -> int:
        """Samples in the traced inputs."""
        leaves = tree_leaves(self.inputs)
        return next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), 1)

    def groups(self) -> Groups:
        """The groups as far as it is known what the code allows."""
        return groups_of(self.walk, exact=self.exact, rigid=self.rigid, still=self.still)

    def plan(self, groups: Groups, gone: NDArray[np.bool_]) -> Plan:
        run = GraphRun(groups, gone, cut=True)
        return Plan(groups.cuts(gone), [*settings_of(run, self.uses), *counts(run, self.stock)])

    def check(self, groups: Groups, gone: NDArray[np.bool_], plan: Plan) -> Fault | None:
        """None if the cut module does what the cut graph does."""
        edges = {}
        names: dict[fx.Node, dict[str, int | None]] = {n: {} for n, _ in groups.graph.edges.values()}
        for name, (node, at) in groups.graph.edges.items():
            names[node][name] = at

        def keep(node: fx.Node, found: Any) -> None:
            for name, at in names.get(node, {}).items():
                edges[name] = (found if at is None else found[at]).clone()  # an operator may write to it

        leaves = tree_leaves(self.inputs)
        GraphRun(groups, gone, cut=True).outputs(self.tensors, leaves, keep)
        model = self.build(plan.cuts, plan.sets)
        return compared(model, self.called, edges)

    def fit(self) -> Groups:
        """The groups that this module's code allows, after as many attempts as needed."""
        for _ in range(ATTEMPTS):
            groups = self.groups()
            gone = trial(groups)
            if not gone.any():
                return groups
            try:
                fault = self.check(groups, gone, self.plan(groups, gone))
            except MISFIT as error:  # a shape that no copy of the module can have
                fault = Fault("", first_line(error))
            except (
                RefusedError
            ) as error:  # tensors of a layer that are not cut alike; it begins with its name
                fault = Fault(str(error).partition(":")[0], str(error).partition(": ")[2])
                if self.keep_whole(groups, fault):
                    continue
            if fault is None:
                if not (strange := self.unequal(groups, gone)):
                    return groups
                for family in strange:
                    self.faults.append(Fault(family.name, "a zero in its place does not equal its removal"))
                    self.still += [
                        (self.walk.tensors[each.tensor][each.axis][each.at.ravel()], "counted by an operator")
                        for each in family.slices
                    ]
                continue
            self.faults.append(fault)
            if not self.stiffen(groups, gone, fault):
                break
        return replace(groups, families=())

    def keep_whole(self, groups: Groups, fault: Fault) -> bool:
        """Freeze the tensors of a layer: a bias that nothing reads is cut with its weight, or not at all.
        First along their first axis, mostly that of outputs, then along all."""
        own = [label for name, label in self.walk.tensors.items() if name.startswith(f"{fault.path}.")]
        living = [label[0] for label in own if label and self.free(groups, label[0])]
        living = living or [array for label in own for array in label if self.free(groups, array)]
        self.still += [(array, f"{fault.path} is not cut alike") for array in living]
        self.faults += [fault] if living else []
        return bool(living)

    def unequal(self, groups: Groups, gone: NDArray[np.bool_]) -> list[Family]:
        """The families whose removal is not the same as zeros, though no flag says so: exp(x).sum()."""

        def both(gone: NDArray[np.bool_], wide: bool) -> list[list[Tensor]]:
            leaves = tree_leaves(self.inputs)
            runs = (GraphRun(groups, gone, cut=cut, wide=wide) for cut in (True, False))
            return [run.outputs(self.tensors, leaves) for run in runs]

        def differs(gone: NDArray[np.bool_]) -> bool:
            try:
                cut, masked = both(gone, wide=True)
            except MISFIT:  # the code fixes a dtype
                cut, masked = both(gone, wide=False)
            return not all(close(x, y) for x, y in zip(cut, masked, strict=True) if x.is_floating_point())

        if not differs(gone):
            return []
        alone = (groups.removed([np.intersect1d(f.units, np.flatnonzero(gone))]) for f in groups.families)
        return [f for f, one in zip(groups.families, alone, strict=True) if one.any() and differs(one)]

    def stiffen(self, groups: Groups, gone: NDArray[np.bool_], fault: Fault) -> bool:
        """Freeze more around a fault: False if nothing is left to freeze."""
        run, path = GraphRun(groups, gone, cut=True), fault.path
        modules = dict(self.build({}, ()).named_modules())
        tables = {table.node for table in self.walk.atoms.tables}
        while True:
            kind = type(modules[path]) if path in modules else None
            mine = [
                node for node in groups.nodes()
                if (at := groups.graph.path(node)) == path or (at in modules and type(modules[at]) is kind)
            ]  # fmt: skip
            fresh = {node.name for node in mine if node.name in tables} - self.rigid
            if fresh:
                self.rigid |= fresh
                return True
            moving = [node for node in mine if any(a != b for a, b in literals(run, node))]
            labels = [label for node in moving for label in labels_in(self.walk.labels[node])]
            living = [array for label in labels for array in label if self.free(groups, array)]
            if living:
                self.still += [(array, f"a width that {kind.__name__ if kind else 'the code'} fixes")
                               for array in living]  # fmt: skip
                return True
            if not path:
                return self.freeze_inside(groups, gone, fault.path, modules)
            path = path.rpartition(".")[0]

    def freeze_inside(
        self, groups: Groups, gone: NDArray[np.bool_], path: str, modules: Mapping[str, nn.Module]
    ) -> bool:
        """The last resort: freeze all that the operators of one module touch."""
        while True:
            inside = [n for n in groups.nodes() if within(groups.graph.path(n), path)]
            given = [
                label
                for n in inside
                for arg in n.all_input_nodes
                for label in labels_in(self.walk.labels.get(arg))
            ]
            living = [array for label in given for array in label if self.free(groups, array)]
            if living:
                self.still += [(array, f"the code of {path or 'the model'} fixes it") for array in living]
                return True
            if not path:
                return False
            path = path.rpartition(".")[0]

    @staticmethod
    def free(groups: Groups, atoms: Array) -> bool:
        return bool((groups.solution.of(atoms) < 0).any())


def within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def trial(groups: Groups) -> NDArray[np.bool_]:
    """A cut of every family, of units spread over it."""
    random = np.random.default_rng(0)
    chosen = []
    for family in (family for family in groups.families if family.size > 2):
        share = TRIAL + SPREAD * float(random.random())  # one share for all could fit the code by chance
        count = min(max(int(share * family.size), 1), family.size - 2)
        chosen.append(random.permutation(family.units)[:count])
    return groups.removed(chosen)


def counts(run: GraphRun, stock: frozenset[str]) -> list[Set]:
    """The numbers of groups of the grouped stock layers that lose some."""
    found: dict[tuple[str, str], int] = {}
    for node, atoms in run.groups.walk.groups.items():
        key = "num_groups" if "group_norm" in node.name else "groups"
        path = run.groups.graph.path(node)
        if path in stock and (count := run.count(atoms)) < len(atoms):
            found[path, key] = count
    return [Set(path, key, count) for (path, key), count in found.items()]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def compared(model: nn.Module, run: Callable[[nn.Module], Any], edges: Mapping[str, Tensor]) -> Fault | None:
    """The first edge at which the module differs from these values, or where it fails."""
    found: list[Fault] = []
    seen: set[str] = set()

    def see(name: str, value: Tensor) -> Tensor:
        path = name.rpartition("/")[0]
        if name not in seen and name in edges and not found:
            wanted = edges[name]
            if value.shape != wanted.shape:
                found.append(Fault(path, f"{name} has shape {list(value.shape)}, not {list(wanted.shape)}"))
            elif value.numel() and not close(value, wanted):
                found.append(Fault(path, f"{name} has other values"))
        seen.add(name)  # a shared module shows a name several times: the first is compared
        return value

    def enter(path: str) -> Callable[[Any, Any], None]:
        return lambda module, args: watched.frames.append(frame(watched, path, holds_tensors(module)))

    watched = WatchedRun(see)

    def leave(module: Any, args: Any, out: Any) -> None:  # not called for the module that fails
        watched.frames.pop()

    for path, module in model.named_modules():
        module.register_forward_pre_hook(enter(path))
        module.register_forward_hook(leave)
    try:
        with running(watched):
            run(model)
    except MISFIT as error:
        return (
            found[0] if found else Fault(watched.frames[-1][0] if watched.frames else "", first_line(error))
        )
    return found[0] if found else None


def close(value: Tensor, wanted: Tensor) -> bool:
    value, wanted = value.double(), wanted.double()
    same = (value == wanted) | (value.isnan() & wanted.isnan())
    finite = wanted.isfinite()
    largest = float(wanted[finite].abs().max()) if finite.any() else 0.0
    return bool((same | ((value - wanted).abs() <= APART * max(largest, 1e-30))).all())
