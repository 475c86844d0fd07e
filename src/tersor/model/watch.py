"""Watch: read and replace the tensors on the edges of a module's own forward.

    path/op:k       the k-th call of op within one call of the module at path      layer1.0/add:0
    path/op:k.j     its j-th output, where it returns a tuple                      cell/lstm:0.0
    path/op:k<j     what its j-th argument reads, where only this reader is meant  fc/linear:0<0
    path/attention:k<softmax     the probabilities inside of scaled_dot_product_attention
    path/lstm:k.0<all            all that an LSTM multiplies: its inputs and hidden states, layer by layer
    /input:NAME     an argument of the module itself; NAME.j inside a container    /input:x

A TorchFunctionMode is entered for one forward; hooks on a private copy keep track of the running module.
`path` is the module's first name in named_modules, and k starts at 0 in each call: the calls of a shared
module share names as they share weights, and neither the length of a loop nor recomputation changes a name.
Of a module without tensors k counts on over one call of its parent: one nn.ReLU often stands for many.
Hooks alone would miss additions and attention; a TorchDispatchMode gets decomposed operators, below autograd.

Cost: a few microseconds a function call. The mode is left after the forward, also after an error.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.errors import RefusedError
from tersor.model.fast_path import no_fast_path
from tersor.model.graph_hooks import keep_hooks
from tersor.model.ops import OPENED, READERS, op_of, place_of, writes
from tersor.model.spelled_attention import INSIDE, spelled_attention

See = Callable[[str, Tensor], Tensor]  # (name of the edge, its value) -> the value that replaces it
Frame = tuple[str, dict[str, int]]  # a running module's path, and the last k of each path/op

_here = threading.local()  # .run: the run of this thread's present forward


class WatchedRun(TorchFunctionMode):
    """One forward. `frames` are the modules that are running, innermost last."""

    def __init__(
        self, see: See | None, frames: list[Frame] | None = None, inputs: bool = False,
        wanted: Iterable[str] = (),
    ):  # fmt: skip
        """`see` is called on each edge; with None, hooks only track modules. `inputs`: arguments are edges
        too. Of what single operators read, `see` is called on those in `wanted`."""
        super().__init__()
        self.see, self.frames, self.inputs = see, frames or [], inputs
        self.wanted = frozenset(wanted)
        self.reads = frozenset(name for name in self.wanted if made_at(name) != name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs or {})
        op = op_of(func)
        if self.reads and op in READERS and self.frames:
            args = tuple(self.read(op, j, arg) for j, arg in enumerate(args))
            kwargs = {key: self.read(op, place_of(op, key), arg) for key, arg in (kwargs or {}).items()}
        if op is not None and self.see is not None and self.frames and self.wanted:
            made, k = self.next(op)
            name = f"{made}:{k}"
            if name in self.wanted and args and floating(args[0]) and writes(func, args, kwargs or {}):
                self.frames[-1][1][made] = k
                # Later code may read the tensor that it writes to, not the one that it returns. The operator
                # gets a copy: its gradients need what it wrote, unrounded.
                return args[0].copy_(self.see(name, func(args[0].clone(), *args[1:], **kwargs or {})))
        if op is not None and self.frames:
            func = self.instead(op, func)
        out = func(*args, **kwargs or {})  # torch turns the mode off here, also while `see` runs
        if op is None or not self.frames or self.see is None:
            return out
        single = isinstance(out, Tensor)
        if not (floating(out) if single else type(out) is tuple and any(map(floating, out))):
            return out
        made, k = self.next(op)
        self.frames[-1][1][made] = k
        if single:
            return self.see(f"{made}:{k}", out)
        return tuple(
            self.see(f"{made}:{k}.{j}", item) if floating(item) else item for j, item in enumerate(out)
        )

    def next(self, op: str) -> tuple[str, int]:
        """(path/op, k) of the next call of `op`."""
        path, counts = self.frames[-1]
        made = f"{path}/{op}"
        return made, counts.get(made, -1) + 1

    def instead(self, op: str, func: Callable[..., Any]) -> Callable[..., Any]:
        """What computes the next call of `op`."""
        return self.attention(func) if op == "attention" and self.reads else func

    def attention(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What computes the next attention: single operators, if its probabilities are wanted."""
        made, k = self.next("attention")
        name = f"{made}:{k}{INSIDE}"
        if self.see is None or name not in self.reads:
            return func
        return partial(spelled_attention, partial(self.see, name))

    def read(self, op: str, j: int | None, value: Any) -> Any:
        """The j-th argument of the next call of `op`, as it is to be read."""
        made, k = self.next(op)
        name = f"{made}:{k}<{j}"
        return self.see(name, value) if name in self.reads and self.see is not None else value


def made_at(name: str) -> str:
    """The edge that is made where this name is read; of the name of an edge the name itself."""
    return name.partition("<")[0]


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def active() -> WatchedRun | None:
    """This thread's present run; None outside of a forward."""
    return getattr(_here, "run", None)


@contextmanager
def running(run: WatchedRun) -> Iterator[WatchedRun]:
    """Make `run` the active one for the hooks, and enter its mode if it watches edges."""
    before = active()
    _here.run = run
    try:
        with no_fast_path(), nullcontext() if run.see is None else run:
            yield run
    finally:
        _here.run = before


class Enter:
    """Hook before a module's forward. A class and not a closure, so that the hooked copy can be pickled."""

    def __init__(self, path: str, needed: bool, holds: bool):
        """`needed`: refuse recomputation in backward outside of a run: its results would differ. `holds`:
        whether the module holds tensors."""
        self.path, self.needed, self.holds = path, needed, holds

    def __call__(self, module: nn.Module, args: Any) -> None:
        run = active()
        if run is not None:
            run.frames.append(frame(run, self.path, self.holds))
        elif self.needed and torch._C._current_graph_task_id() != -1:  # inside backward: recomputation
            raise RefusedError(
                f"{self.path or 'the model'}: gradient checkpointing runs it again without the grids on its "
                f"edges, so the gradients would be wrong. Give checkpoint use_reentrant=False and "
                f"context_fn=tuned.resume, or train without checkpointing"
            )


def frame(run: WatchedRun, path: str, holds: bool) -> Frame:
    """The frame of a module that begins to run. `holds`: whether it holds tensors."""
    return path, {} if holds or not run.frames else run.frames[-1][1]


def holds_tensors(module: nn.Module) -> bool:
    """Whether a module or one inside it has a parameter or a buffer."""
    return any(True for each in (module.parameters, module.buffers) for _ in each())


class Leave:
    """Hook after a module's forward, also after an error."""

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        run = active()
        if run is not None and run.frames:
            run.frames.pop()


class Arguments:
    """Hook before the outermost forward: its arguments are edges, named as in the signature."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        run = active()
        if run is None or run.see is None or not run.inputs or len(run.frames) != 1:
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        kinds = bound.signature.parameters
        # The mode is on here, unlike in __torch_function__. Without a frame it counts no call of `see`.
        frames, run.frames = run.frames, []
        try:
            for name, value in bound.arguments.items():
                if kinds[name].kind is inspect.Parameter.VAR_KEYWORD:
                    seen = {key: through(run.see, key, item) for key, item in value.items()}
                else:
                    seen = through(run.see, name, value)
                bound.arguments[name] = seen
        finally:
            run.frames = frames
        return bound.args, bound.kwargs


def through(see: See, name: str, value: Any) -> Any:
    """An argument with `see` applied to its floating tensors, also in dicts, tuples and lists."""
    if floating(value):
        return see(f"/input:{name}", value)
    if type(value) is dict:
        return {key: through(see, f"{name}.{key}", item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(through(see, f"{name}.{j}", item) for j, item in enumerate(value))
    return value


def input_names(model: nn.Module, inputs: Any) -> list[str]:
    """The edge of each leaf of `model(*inputs)` or `model(**inputs)`, in the order of torch's tree_leaves."""
    if isinstance(inputs, dict):
        given = inputs
    else:
        given = inspect.signature(model.forward).bind(*inputs).arguments
    return [f"/input:{leaf}" for name, value in given.items() for leaf in leaf_names(name, value)]


def leaf_names(name: str, value: Any) -> list[str]:
    """The names that `through` gives the leaves of an argument."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaf_names(f"{name}.{key}", item)]
    if isinstance(value, (tuple, list)):
        return [leaf for j, item in enumerate(value) for leaf in leaf_names(f"{name}.{j}", item)]
    return [name]


def hooked(net: nn.Module, needed: bool = True) -> nn.Module:
    """The given module, a private copy, with hooks that track the running module. `needed`: see Enter."""
    for path, module in net.named_modules():
        if not path:
            module.register_forward_pre_hook(Arguments(), prepend=True, with_kwargs=True)
        module.register_forward_pre_hook(Enter(path, needed, holds_tensors(module)), prepend=True)
        module.register_forward_hook(Leave(), always_call=True)
    keep_hooks(net)
    return net
