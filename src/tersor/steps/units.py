"""Units: what a view's model consists of: families that may be cut, and the layers that read units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, fx
from torch.utils._pytree import tree_map

from tersor.core.view import View
from tersor.errors import RefusedError
from tersor.model.batches import device_of, move
from tersor.model.changes import Set
from tersor.model.channels.atoms import Array
from tersor.model.channels.groups import Family, Groups, walked
from tersor.model.channels.own_module import Cuts, OwnModule
from tersor.model.channels.walk import Walk
from tersor.model.example import example_inputs
from tersor.model.graph import Inputs, arguments, op_name
from tersor.record.events import Cut, Group

LEAST = 2  # units that stay in a family: a dimension of size 1 may be squeezed or broadcast
OUTSIDE = "it is outside of the part that the task names"
SAMPLES = 2  # of the example: enough for a graph, few enough for a large model


class Timing(Protocol):
    """The settings that say how a network is timed."""

    @property
    def runtime(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def batch(self) -> int: ...


class Settings(Timing, Protocol):
    """The settings of Slim that say what is asked."""

    @property
    def keep(self) -> float: ...
    @property
    def of(self) -> str: ...
    @property
    def per(self) -> str: ...
    @property
    def multiple(self) -> int: ...
    @property
    def unmet(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a view's model that may be cut."""

    view: View
    own: OwnModule
    groups: Groups
    families: list[Family]
    chosen: frozenset[str]  # the weights that `where` picks


def units_of(view: View, where: str | tuple[str, ...], exact: bool) -> Units:
    """The families that the model's own code allows, and all of whose makers `where` picks."""
    own = own_module(view, exact)
    groups, chosen = own.fit(), frozenset(site.name for site in view.weights(where))
    return Units(view, own, groups, eligible(groups, view, chosen), chosen)


def eligible(groups: Groups, view: View, chosen: frozenset[str]) -> list[Family]:
    found = []
    for family in groups.families:
        weights = [s for s in family.slices if view.sites[s.tensor].is_weight]
        makers = {s.tensor for s in weights if s.axis == view.sites[s.tensor].axis}
        makers = makers or {s.tensor for s in weights}
        if family.size > LEAST and makers and makers <= chosen:
            found.append(family)
    return found


def own_module(view: View, exact: bool) -> OwnModule:
    """The model of this view, walked. RefusedError if it cannot be traced."""

    def build(cuts: Cuts, sets: Sequence[Set]) -> object:
        events = [
            Cut(name, axis, tuple(view.present(name, axis)[int(at)] for at in kept))
            for (name, axis), kept in cuts.items()
        ]
        return view.after(Group("trial", (*events, *sets))).plain() if events or sets else view.plain()

    view = view.part
    walk, few = walk_of(view)
    return OwnModule(walk, few, build, exact)  # type: ignore[arg-type]


def walk_of(view: View) -> tuple[Walk, Inputs]:
    """The walked graph of this view's model, and the inputs that it was traced with. RefusedError if it
    cannot be traced."""
    view = view.part
    model = view.plain()
    inputs = move(example_inputs(view.task, model), device_of(model))
    few, stored = shortened(inputs), {name for name in view.forms if view.inside(name)}
    try:
        return walked(model, few, stored), few
    except RefusedError:  # its inputs have other first axes than the batch
        return walked(model, inputs, stored), inputs


def shortened(inputs: Inputs) -> Inputs:
    """The first samples of inputs that are tensors with a batch axis of one size. In a list of images each
    image is a tensor, and the list is the batch: it stays."""
    every = list(inputs.values() if isinstance(inputs, dict) else inputs)
    sizes = {len(x) for x in every if isinstance(x, Tensor) and x.ndim}
    if len(sizes) != 1 or any(isinstance(x, (list, tuple, dict)) for x in every):
        return inputs
    found: Inputs = tree_map(lambda x: x[:SAMPLES] if getattr(x, "ndim", 0) else x, inputs)
    return found


class UnitReader(NamedTuple):
    """A stock layer's product, with the atoms that it reads and makes."""

    path: str
    weight: str
    columns: Array  # atoms of its inputs
    rows: Array  # of its outputs
    norm: str = ""  # the batch norm that alone reads its outputs


def readers_of(groups: Groups, view: View) -> list[UnitReader]:
    """The linear layers and ungrouped convolutions, in the order of the graph."""
    return list(found_readers(groups, view))


def found_readers(groups: Groups, view: View) -> Iterator[UnitReader]:
    graph, walk = groups.graph, groups.walk
    for node in groups.nodes():
        given = arguments(node)
        read = given.get("weight")
        weight = graph.tensors.get(read) if isinstance(read, fx.Node) else None
        if weight is None or op_name(node) not in ("linear", "conv1d", "conv2d"):
            continue
        site = view.sites.get(weight)
        path = graph.path(node)
        if site is None or weight != f"{path}.weight" or weight in view.state.aliases.values():
            continue  # a weight that others use too cannot be refitted for one of them
        if given.get("groups", 1) != 1 or len(walk.tensors[weight]) < 2:
            continue
        label = walk.tensors[weight]
        norms = [user for user in node.users if op_name(user) == "batch_norm"]
        alone = len(norms) == len(node.users) == 1 and graph.path(norms[0]) in paths_with_statistics(view)
        yield UnitReader(path, weight, label[1], label[0], graph.path(norms[0]) if alone else "")


def paths_with_statistics(view: View) -> set[str]:
    return {name.rpartition(".")[0] for name in view.forms if name.endswith("running_mean")}
