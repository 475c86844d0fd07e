"""Watch: see, and replace, the tensors on the edges of a module's own forward.

    path/op:k       the k-th call of op within one call of the module at path      layer1.0/add:0
    path/op:k.j     its j-th output, where it returns a tuple                      cell/lstm:0.0
    /input:NAME     an argument of the module itself; NAME.j inside a container    /input:x

A function mode is entered for one forward; hooks on a private copy say which module is running. `path` is
that module's first name, and k counts anew in each call: the calls of a shared module share names as they
share weights, and neither the length of a loop nor recomputation changes any. Hooks alone would see no
additions and no attention; a dispatch mode sees decomposed operators, below autograd.

Cost: some microseconds a function call. Nothing stays when the forward has ended, with an error or without.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.errors import RefusedError
from tersor.model.ops import OPENED, op_of

See = Callable[[str, Tensor], Tensor]  # (name of the edge, its value) -> the value that goes on
Frame = tuple[str, dict[str, int]]  # a running module's path, and how often each op was called in it

_here = threading.local()  # .run: the run of the forward that this thread is in


class WatchedRun(TorchFunctionMode):
    """One forward. `frames` are the modules that are running, innermost last."""

    def __init__(self, see: See | None, frames: list[Frame] | None = None, inputs: bool = False):
        """With `see` None nothing is watched, yet hooks know the run. `inputs`: arguments are edges too."""
        super().__init__()
        self.see, self.frames, self.inputs = see, frames or [], inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs or {})
        out = func(*args, **kwargs or {})  # the mode is off inside, for `see` too
        op = op_of(func)
        if op is None or not self.frames or self.see is None:
            return out
        single = isinstance(out, Tensor)
        if not (floating(out) if single else type(out) is tuple and any(map(floating, out))):
            return out
        path, counts = self.frames[-1]
        k = counts[op] = counts.get(op, -1) + 1
        if single:
            return self.see(f"{path}/{op}:{k}", out)
        return tuple(
            self.see(f"{path}/{op}:{k}.{j}", item) if floating(item) else item for j, item in enumerate(out)
        )


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def active() -> WatchedRun | None:
    """The run that this thread is in."""
    return getattr(_here, "run", None)


@contextmanager
def running(run: WatchedRun) -> Iterator[WatchedRun]:
    """The hooks find `run`, and the mode is on where it has something to see."""
    before = active()
    _here.run = run
    try:
        if run.see is None:
            yield run
        else:
            with run:
                yield run
    finally:
        _here.run = before


class Enter:
    """Before a module's forward. A class and not a closure, so that the hooked copy can be pickled."""

    def __init__(self, path: str, needed: bool):
        """`needed`: a forward outside of a run, in backward, would be another one."""
        self.path, self.needed = path, needed

    def __call__(self, module: nn.Module, args: Any) -> None:
        run = active()
        if run is not None:
            run.frames.append((self.path, {}))
        elif self.needed and torch._C._current_graph_task_id() != -1:  # inside backward: it is run again
            raise RefusedError(
                f"{self.path or 'the model'}: gradient checkpointing runs it again without the grids on its "
                f"edges: the gradients would be wrong. Give it use_reentrant=False and "
                f"context_fn=tuned.resume, or train without checkpointing"
            )


class Leave:
    """After a module's forward, also when that raised."""

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        run = active()
        if run is not None and run.frames:
            run.frames.pop()


class Arguments:
    """Before the outermost forward: its arguments are edges by their names in the signature."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        run = active()
        if run is None or run.see is None or not run.inputs or len(run.frames) != 1:
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        kinds = bound.signature.parameters
        for name, value in bound.arguments.items():
            if kinds[name].kind is inspect.Parameter.VAR_KEYWORD:
                seen = {key: through(run.see, key, item) for key, item in value.items()}
            else:
                seen = through(run.see, name, value)
            bound.arguments[name] = seen
        return bound.args, bound.kwargs


def through(see: See, name: str, value: Any) -> Any:
    """An argument with all its floating tensors seen; containers are entered, other objects are not."""
    if floating(value):
        return see(f"/input:{name}", value)
    if type(value) is dict:
        return {key: through(see, f"{name}.{key}", item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(through(see, f"{name}.{j}", item) for j, item in enumerate(value))
    return value


def hooked(net: nn.Module, needed: bool = True) -> nn.Module:
    """The same module, which must be a private copy, with hooks that tell a run where it is. `needed`: see
    Enter."""
    for path, module in net.named_modules():
        if not path:
            module.register_forward_pre_hook(Arguments(), prepend=True, with_kwargs=True)
        module.register_forward_pre_hook(Enter(path, needed), prepend=True)
        module.register_forward_hook(Leave(), always_call=True)
    return net
