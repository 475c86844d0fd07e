"""Edges: the tensors between a model's operators, by name, and a check that names agree in training.

One forward of a private copy in eval mode lists them in order. watch.py describes the names.
Cost: a copy of the model and one forward; the check runs a second forward in training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, SiteError, near_few
from tersor.model.batches import evaluating, steady
from tersor.model.ops import LISTED, READERS
from tersor.model.spelled_attention import INSIDE
from tersor.model.spelled_lstm import ALL
from tersor.model.watch import WatchedRun, hooked, made_at, running

INSIDES = {"attention": INSIDE, "lstm": ALL}  # what runs round inside of operators

Call = Callable[[nn.Module], Any]  # how a model is run once: lambda net: net(x)


@dataclass(frozen=True)
class Edge:
    """One edge, as seen in the forward that listed it."""

    name: str
    shape: tuple[int, ...]  # in its first use
    dtype: str  # "float32", without "torch."
    uses: int  # times per forward: a shared module's edges are used once per call

    @property
    def path(self) -> str:
        """The module whose forward makes this edge; "" for the model itself and for its arguments."""
        return parse(self.name)[0]

    @property
    def op(self) -> str:
        """The operator that makes it; "input" for arguments."""
        return parse(self.name)[1]


def parse(name: str) -> tuple[str, str]:
    """(path, op) of an edge's name."""
    path, slash, rest = name.rpartition("/")
    edge, place = made_at(rest), rest.removeprefix(made_at(rest))
    op, colon, count = edge.partition(":")
    argument = op == "input" and not path and count
    made = op in LISTED and count.replace(".", "", 1).isdigit() and known_place(op, place)
    if not slash or not colon or not (argument or made):
        raise SiteError(
            f"{name!r} is no edge name: it must be path/op:k, such as layer1.0/add:0, path/op:k<j, or "
            f"/input:x"
        )
    return path, op


def known_place(op: str, place: str) -> bool:
    """Whether a run meets this place of an operator, the end of a name; "" is what it makes."""
    return place in {"", INSIDES.get(op)} or (op in READERS and place[1:].isdigit())


class Listing(WatchedRun):
    """A run that lists the edges it meets."""

    def __init__(self) -> None:
        super().__init__(self.meet, inputs=True)
        self.edges: dict[str, Edge] = {}

    def meet(self, name: str, x: Tensor) -> Tensor:
        if name in self.edges:
            self.edges[name] = replace(self.edges[name], uses=self.edges[name].uses + 1)
        else:
            dtype = str(x.dtype).removeprefix("torch.")
            self.edges[name] = Edge(name, tuple(x.shape), dtype, 1)
        return x


def edges_of(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Edge]:
    """The edges that `model(*args, **kwargs)` meets in eval mode without gradients, by name and in order.

    The model, its mode and all random state do not change. Edges that depend on the arguments' values (a
    branch, an expert that gets no token) are listed only if these arguments reach them.
    """
    net = hooked(copy.deepcopy(model))
    with evaluating(net):
        return listed(net, lambda net: net(*copy.deepcopy(args), **copy.deepcopy(kwargs)))


def listed(net: nn.Module, call: Call) -> dict[str, Edge]:
    """The edges that `call(net)` meets in the current mode of the hooked net."""
    run = Listing()
    with steady(), torch.no_grad(), running(run):
        call(net)
    return run.edges


def known(edges: Mapping[str, Edge], names: Iterable[str], who: str) -> None:
    """SiteError with near misses for a name that is not an edge of this model."""
    for name in names:
        parse(name)
        if made_at(name) not in edges:
            raise SiteError(f"{who}: the model has no edge {name!r}; {near(name, edges)}")


def near(name: str, names: Iterable[str]) -> str:
    """Near misses for a name, as a list that stays short for large models."""
    return near_few(name, [other or "''" for other in names], "there are")


def check_same_in_training(model: nn.Module, names: Iterable[str], call: Call | None) -> None:
    """Refuse edges that `call(model)` does not meet, or whose names may mean another edge in training mode.

    A module's branch on `training` shifts the counts of later edges. A name means the same edge in both modes
    if its module makes the same edges in the same order up to it.
    """
    if not (names := list(names)):
        return
    if call is None:
        raise SettingError(
            "grids on edges: give example=lambda net: net(x) too; a forward shows which edges exist"
        )
    net = hooked(copy.deepcopy(model))
    with evaluating(net):
        known(shown := listed(net, call), names, "training")
        net.train()
        now, then = _sequences(listed(net, call)), _sequences(shown)
    for name in names:
        path, op = parse(name)
        until = then[path].index(made_at(name)) + 1
        if op != "input" and now.get(path, [])[:until] != then[path][:until]:
            raise RefusedError(
                f"{name}: {path or 'the model itself'} runs other operators in training ({_ops(now, path)}) "
                f"than in evaluation ({_ops(then, path)}), so the name could mean another edge. Choose an "
                f"edge of another module, or move the code that only training runs into a module of its own."
            )


def _sequences(edges: Mapping[str, Edge]) -> dict[str, list[str]]:
    """The edges that each module makes, in order."""
    found: dict[str, list[str]] = {}
    for edge in edges.values():
        found.setdefault(edge.path, []).append(edge.name)
    return found


def _ops(sequences: Mapping[str, list[str]], path: str) -> str:
    return ", ".join(name.rpartition("/")[2] for name in sequences.get(path, [])) or "nothing"
