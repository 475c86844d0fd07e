"""Simulate: a model with grids on its edges, called exactly like the model.

The module's own forward runs, on a private copy, and each tensor on a chosen edge is rounded to its grid.
torch.export can trace the simulation: each use of a grid becomes one node.
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
from tersor.model.grid_part import GridPart, uses
from tersor.model.spelled_lstm import ALL
from tersor.model.watch import WatchedRun, active, hooked, made_at, running


class Simulated(nn.Module):
    """A private copy of a model with grids on its edges. `forward` has the model's own signature."""

    net: nn.Module
    grids: nn.ModuleDict
    hidden = False  # whether `parameters()` and `state_dict()` leave out the net's own tensors

    def __init__(self, model: nn.Module, edge_grids: Mapping[str, Grid] | None = None):
        """`model` is a private copy. `edge_grids`: name of an edge (see edges.py) -> its grid."""
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
        """Move also the non-persistent buffers of a hidden net, which is not a submodule."""
        super()._apply(fn, recurse)
        for module in self.net.modules() if self.hidden else ():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers[name]) is not None:
                    module._buffers[name] = fn(buffer)
        return self

    def values(self) -> dict[str, Tensor]:
        """The tensors that replace the net's own in a forward, by name: none here."""
        return {}

    def call(self, args: Any, kwargs: Any) -> Any:
        """The net's output, with `values` in place of its tensors and the grids on its edges."""
        values = self.values()
        with running(self.watched(values)), with_tensors(self.net, values):
            out = self.net(*args, **kwargs)
        self.keep(values)
        self.leave(values)
        return out

    def watched(self, values: dict[str, Tensor]) -> Values:
        """The run of a forward."""
        return Values(self, values)

    def leave(self, values: Mapping[str, Tensor]) -> None:
        """Called after a forward: set the net's own tensors until the next one. Does nothing here."""

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Called after a forward with the tensors that replaced the net's own. Does nothing here."""

    def see(self, name: str, x: Tensor) -> Tensor:
        place = self.table.get(name)
        if place is None:
            return x
        refuse_reentry()
        return cast(GridPart, self.grids[place]).value(x)

    def resume(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """context_fn for torch.utils.checkpoint: recomputation uses the same weights, grids and names.
        Modules that hold their checkpoint function (Hugging Face) get it automatically: checkpointing.py."""
        run = active()
        if not isinstance(run, Values):
            raise RefusedError(
                "resume: it is called outside of the model's forward; pass it to checkpoint(context_fn=...)"
            )
        frames = [(path, dict(counts)) for path, counts in run.frames]

        @contextmanager
        def again() -> Iterator[None]:
            here = [(path, dict(counts)) for path, counts in frames]
            with running(Values(self, run.values, here)), with_tensors(self.net, run.values):
                yield

        return contextlib.nullcontext(), Anew(again)

    def fold_grids(self) -> dict[str, Grid]:
        """The grids as they are now, by the names of their edges."""
        return {name: cast(GridPart, self.grids[place]).fold() for name, place in self.table.items()}

    def sign(self) -> None:
        """Set `forward` with the net's signature, for code that inspects it: exporters, trainers that drop
        unknown columns. It is bound to this instance, so each copy makes its own. The weak reference avoids a
        cycle, so a large model is freed with its last reference."""
        me = weakref.ref(self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (simulated := me()) is None:
                raise RefusedError("forward: its module was freed; keep a reference to the module")
            return simulated.call(args, kwargs)

        forward.__signature__ = inspect.signature(self.net.forward)  # type: ignore[attr-defined]
        self.forward: Callable[..., Any] = forward

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.sign()


class Values(WatchedRun):
    """A run of a simulation, with the tensors that replace the net's own."""

    def __init__(self, simulated: Simulated, values: dict[str, Tensor], frames: Any = None):
        table = simulated.table
        inputs = any(name.startswith("/input:") for name in table)
        super().__init__(simulated.see if table else None, frames, inputs, table)
        self.values, self.simulated, self.learns = values, simulated, torch.is_grad_enabled()

    def instead(self, op: str, func: Callable[..., Any]) -> Callable[..., Any]:
        if op == "lstm":
            made, k = self.next(op)
            place = self.simulated.table.get(f"{made}:{k}.0{ALL}")
            if place is not None:
                refuse_reentry()
                return cast(GridPart, self.simulated.grids[place]).lstm
        return super().instead(op, func)


class Anew(AbstractContextManager[None]):
    """A context that is made again on each entry: a retained graph may be recomputed more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make, self.open = make, contextlib.ExitStack()

    def __enter__(self) -> None:
        self.open.enter_context(self.make())

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)


@contextmanager
def with_tensors(net: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Replace the net's own tensors by these, ties included, within the context; afterwards `values` holds
    the tensors that were in place at its end.

    torch.func.functional_call does the same for one call; checkpointing needs it around a part of one. Each
    module is listed once: one listed under two names would keep the replaced tensors.
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
    """A name as the key of a submodule: no dots, and no clash with attributes of modules."""
    return "/" + name.replace(".", "/")


def gridded(model: nn.Module, grids: Mapping[str, Grid]) -> Simulated:
    """A copy of the model with these grids on its edges; no parameter requires gradients."""
    return Simulated(copy.deepcopy(model), grids).requires_grad_(False)


def with_grids(model: nn.Module, grids: Mapping[str, Grid]) -> nn.Module:
    """The given model itself, not a copy, with grids on its edges; RefusedError if one is stale."""
    refuse_stale(grids)
    return Simulated(model, grids).requires_grad_(False) if grids else model


def refuse_stale(grids: Mapping[str, Grid]) -> None:
    """RefusedError if a grid is stale."""
    stale = [edge for edge, grid in grids.items() if grid.stale]
    if stale:
        raise RefusedError(
            f"{stale[0]}: its grid is stale, and {len(stale) - 1} more: later steps changed the values on "
            f"the edge. Calibrate again, or undo these steps"
        )


def exported(simulated: Simulated, *args: Any, **kwargs: Any) -> ExportedProgram:
    """The simulation as a graph, for these arguments and in eval mode; each use of a grid is one node.

    RefusedError if the trace lost or doubled a grid, and for a model in training.
    """
    if simulated.hidden:
        raise RefusedError(
            "export: a model in training has no weights of its own; fold it, then call gridded(...)"
        )
    known(edges := edges_of(simulated.net, *args, **kwargs), simulated.table, "export")
    marked = copy.deepcopy(simulated).eval()
    for part in marked.grids.values():
        part.marked = True  # type: ignore[assignment]
    with torch.no_grad():
        program = torch.export.export(marked, args, kwargs, strict=False)
    nodes, wanted = uses(program), sum(edges[made_at(name)].uses for name in simulated.table)
    if nodes != wanted:
        raise RefusedError(f"export: grids are used {wanted} times, but the graph has {nodes} of them")
    return program
