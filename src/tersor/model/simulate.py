"""Simulate: a model with grids on its edges, called exactly as the model is.

The module's own forward runs, on a private copy, and each tensor on a chosen edge goes through its grid. The
same simulation is what torch.export traces: there each use of a grid becomes one node.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.stateless import _reparametrize_module

from tersor.errors import RefusedError, SiteError
from tersor.forms.grid import Grid
from tersor.model.batches import device_of
from tersor.model.checkpointing import refuse_reentry, rerun
from tersor.model.edges import edges_of, known, near, parse
from tersor.model.grid_part import GridPart
from tersor.model.watch import WatchedRun, active, hooked, running


class Simulated(nn.Module):
    """A private copy of a model whose edges go through grids. `forward` has the model's own signature."""

    net: nn.Module
    grids: nn.ModuleDict
    hidden = False  # whether `parameters()` and `state_dict()` know nothing of the net's own tensors

    def __init__(self, model: nn.Module, edge_grids: Mapping[str, Grid] | None = None):
        """`model` is a private copy. `edge_grids`: for each chosen edge, by name (see edges.py), its grid."""
        super().__init__()
        net = hooked(rerun(model), bool(edge_grids))
        if self.hidden:
            object.__setattr__(self, "net", net)
        else:
            self.net = net
        given = edge_grids or {}
        paths = dict(self.net.named_modules())
        for name in given:
            if (path := parse(name)[0]) not in paths:
                raise SiteError(f"{name}: the model has no module {path!r}; {near(path, paths)}")
        self.grids = nn.ModuleDict({key(name): GridPart(name, grid) for name, grid in given.items()})
        self.grids.to(device_of(model))
        self.table = {name: key(name) for name in given}
        self.sign()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What only a hidden net holds moves too: buffers that no state dict lists."""
        super()._apply(fn, recurse)
        for module in self.net.modules() if self.hidden else ():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers[name]) is not None:
                    module._buffers[name] = fn(buffer)
        return self

    def values(self) -> dict[str, Tensor]:
        """What stands in for the net's own tensors, by name: here nothing does."""
        return {}

    def call(self, args: Any, kwargs: Any) -> Any:
        """The net's answer, with `values` in its place and the grids on its edges."""
        values = self.values()
        with running(Values(self, values)), placed(self.net, values):
            out = self.net(*args, **kwargs)
        self.keep(values)
        self.leave(values)
        return out

    def leave(self, values: Mapping[str, Tensor]) -> None:
        """What the net's own tensors are to be until the next forward: here what they are."""

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """What stands in the place of the net's tensors when a forward has ended: here nothing does."""

    def see(self, name: str, x: Tensor) -> Tensor:
        place = self.table.get(name)
        if place is None:
            return x
        refuse_reentry()
        return cast(GridPart, self.grids[place]).value(x)

    def resume(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """context_fn for torch.utils.checkpoint: what is run again sees the same weights, grids and names.
        Modules that hold their checkpoint function (Hugging Face) get it by themselves: checkpointing.py."""
        run = active()
        if not isinstance(run, Values):
            raise RefusedError("resume: checkpoint(context_fn=...) asks for it, inside the model's forward")
        frames = [(path, dict(counts)) for path, counts in run.frames]

        @contextmanager
        def again() -> Iterator[None]:
            here = [(path, dict(counts)) for path, counts in frames]
            with running(Values(self, run.values, here)), placed(self.net, run.values):
                yield

        return contextlib.nullcontext(), Anew(again)

    def fold_grids(self) -> dict[str, Grid]:
        """The grids as they are now, by the names of their edges."""
        return {name: cast(GridPart, self.grids[place]).fold() for name, place in self.table.items()}

    def sign(self) -> None:
        """`forward` with the net's signature, so that whoever asks for it (exporters, trainers that drop
        unknown columns) finds what the user wrote. It belongs to this instance, so each copy makes its own;
        the weak reference lets a large model go as soon as nobody holds it."""
        me = weakref.ref(self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (simulated := me()) is None:
                raise RefusedError("forward: its module is gone; keep the module")
            return simulated.call(args, kwargs)

        forward.__signature__ = inspect.signature(self.net.forward)  # type: ignore[attr-defined]
        self.forward: Callable[..., Any] = forward

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.sign()


class Values(WatchedRun):
    """A run of a simulation, which knows the tensors that stand in for the net's own."""

    def __init__(self, simulated: Simulated, values: dict[str, Tensor], frames: Any = None):
        table = simulated.table
        inputs = any(name.startswith("/input:") for name in table)
        super().__init__(simulated.see if table else None, frames, inputs)
        self.values, self.simulated, self.learns = values, simulated, torch.is_grad_enabled()


class Anew(AbstractContextManager[None]):
    """A context that is made anew each time it is entered: a graph that is kept may be gone through twice."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make, self.open = make, contextlib.ExitStack()

    def __enter__(self) -> None:
        self.open.enter_context(self.make())

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)


@contextmanager
def placed(net: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The net with these tensors in the place of its own, ties included, for as long as the context lasts;
    afterwards `values` are what stood there last.

    torch.func.functional_call does the same for one call; checkpointing needs it around a part of one. It is
    told each module once: one under two names would keep what was put there.
    """
    own = tensors_of(net) if values else {}
    names = {id(own[name]): name for name in values}
    slots = {
        f"{path}.{name}" if path else name: names[id(tensor)]
        for path, module in net.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and id(tensor) in names  # torch.compile does not trace id(None)
    }
    placed_here = {slot: values[name] for slot, name in slots.items()}
    with _reparametrize_module(net, placed_here) if values else contextlib.nullcontext():
        yield
    values.update({name: placed_here[slot] for slot, name in slots.items()})


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, under every name."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(net.named_buffers(remove_duplicate=False))}


def key(name: str) -> str:
    """A name as a module's: dots are not allowed there, nor names that modules use themselves."""
    return "/" + name.replace(".", "/")


def gridded(model: nn.Module, grids: Mapping[str, Grid]) -> Simulated:
    """A copy of the model that answers with these grids on its edges; nothing in it asks for gradients."""
    return Simulated(copy.deepcopy(model), grids).requires_grad_(False)


def with_grids(model: nn.Module, grids: Mapping[str, Grid]) -> nn.Module:
    """A model that is the caller's own with grids on its edges; RefusedError where one is stale."""
    fresh(grids)
    return Simulated(model, grids).requires_grad_(False) if grids else model


def fresh(grids: Mapping[str, Grid]) -> None:
    """Refuse grids of which one is stale."""
    stale = [edge for edge, grid in grids.items() if grid.stale]
    if stale:
        raise RefusedError(
            f"{stale[0]}: its grid is stale, and {len(stale) - 1} more: what came after it changed what the "
            f"edge holds. Calibrate again, or undo to where it was fresh"
        )


def exported(simulated: Simulated, *args: Any, **kwargs: Any) -> ExportedProgram:
    """The simulation as a graph, for these arguments and in eval mode; each use of a grid is one node.

    RefusedError where a grid was lost on the way, or doubled, and for a model in training.
    """
    if simulated.hidden:
        raise RefusedError(
            "export: a model in training has no weights of its own; fold it, then gridded(...)"
        )
    known(edges := edges_of(simulated.net, *args, **kwargs), simulated.table, "export")
    marked = copy.deepcopy(simulated).eval()
    for part in marked.grids.values():
        part.marked = True  # type: ignore[assignment]
    with torch.no_grad():
        program = torch.export.export(marked, args, kwargs, strict=False)
    nodes = sum(node.target is torch.ops.tersor.grid.default for node in program.graph.nodes)
    uses = sum(edges[name].uses for name in simulated.table)
    if nodes != uses:
        raise RefusedError(f"export: grids are used {uses} times, but the graph has {nodes} of them")
    return program
