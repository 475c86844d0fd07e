"""Program: a graph of torch.export as a model, so that what its code fixes can be cut too.

x.view(B, 2, C // 2, H, W)   in the user's code: the 2 and C // 2 are theirs, so channels stay or are frozen
view(x, [s, 2, 58, 28, 28])  in the program: each number is an integer of the module, program.view_1__1_1, and
                             is set like any other (channels/integers.py finds it, changes.Set changes it)
Layers that the graph shows whole (convolution, linear, norms, dropout) are stock layers again, under their
names: they train, hooks see them, a runtime gets them. Everything else is the operators of the graph, in
order (program_builder.py). What the trace fixed stays fixed: the path through the code, all sizes but
dynamic ones, and eval mode outside of stock layers. Cost: about 6 us an operator beyond what the model's own
forward takes (views and additions, one thread).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Value(NamedTuple):
    """What an earlier operator made."""

    name: str


class Held(NamedTuple):
    """A tensor of the module."""

    path: str


class Number(NamedTuple):
    """An integer of the module: an attribute of this name."""

    name: str


class Constant(NamedTuple):
    """An argument that is no tensor: the trace followed the code for this value."""

    value: Any


@dataclass(frozen=True)
class Call:
    """One operator, or one call of a stock layer."""

    name: str
    target: Any  # aten.view.default; a function of Python; the path of a layer
    args: Any
    kwargs: Any
    last: tuple[str, ...]  # values that nothing after it reads
    layer: bool = False


class Program(nn.Module):
    """A model whose forward is a list of calls. It has the model's tensors and layers, and the integers of
    the calls; all else is in its forward, so no name of the model's is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Forward = Forward(self)


class Forward:
    """The forward of one program, with the signature that exporters and tasks look for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls: tuple[Call, ...] = ()
        self.inputs: tuple[str, ...] = ()  # names of the values that the leaves of the arguments become
        self.shapes: tuple[Any, ...] = ()  # of these; a size that may vary is None; a Constant for no tensor
        self.guards: tuple[str, ...] = ()  # what must hold too, in Python: "x.size()[0] >= 5"
        self.check: Any = None  # the function that these make
        self.asleep: tuple[str, ...] = ()  # calls of eval mode, which may do more in training
        self.results: tuple[Any, ...] = ()
        self.in_spec: Any = None  # how arguments and results are nested
        self.out_spec: Any = None
        self.__signature__ = inspect.Signature()

    @property
    def __code__(self) -> Any:  # where torch.export says that the model's code is
        return Forward.__call__.__code__

    @property
    def sizes(self) -> str:
        """The sizes of the arguments, for messages: x [*, 3, 224, 224]."""
        return ", ".join(
            f"{name}={shape.value!r}" if isinstance(shape, Constant)
            else f"{name} [{', '.join('*' if n is None else str(n) for n in shape)}]"
            for name, shape in zip(self.inputs, self.shapes, strict=True) if shape is not None
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "check": None}  # made by eval, so pickle cannot store it

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.guard(self.guards)

    def guard(self, guards: tuple[str, ...]) -> None:
        """Check these at each call: expressions of the arguments, by their names in the signature."""
        self.guards = guards
        self.check = guard_function(guards, tuple(self.__signature__.parameters)) if guards else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, self.leaves(args, kwargs), strict=True))

        def found(item: Any) -> Any:
            kind = type(item)
            if kind is Value:
                return values[item.name]
            if kind is Number:
                return getattr(self.program, item.name)
            if kind is Held:
                return held(self.program, item.path)
            if kind in (tuple, list):
                return kind(map(found, item))
            return item

        for call in self.calls:
            run = self.program.get_submodule(call.target) if call.layer else function(call.target)
            named = {key: found(item) for key, item in call.kwargs.items()}
            values[call.name] = run(*found(call.args), **named)
            for name in call.last:
                del values[name]
        return tree_unflatten([found(item) for item in self.results], self.out_spec)

    def leaves(self, args: Any, kwargs: Any) -> list[Any]:
        """The leaves of the arguments; TypeError if they are not those of the trace."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        places, words = self.in_spec.children()
        names = list(self.__signature__.parameters)
        first = tuple(given[name] for name in names[: places.num_children])
        leaves, spec = tree_flatten((first, {name: given[name] for name in words.context}))
        if spec != self.in_spec:
            args, named = tree_unflatten(list(self.inputs), self.in_spec)
            nested = ", ".join((*map(str, args), *(f"{key}={item}" for key, item in named.items())))
            raise TypeError(f"the program was exported for arguments nested and ordered as ({nested})")
        if not all(map(fits, leaves, self.shapes)):
            raise TypeError(f"the program was exported for {self.sizes} (* may vary)")
        failed = [] if self.check is None else self.check(**given)
        if not all(failed):
            broken = self.guards[[bool(held) for held in failed].index(False)]
            raise TypeError(f"the program was exported for {self.sizes} (* may vary), where {broken}")
        return leaves


def function(target: Any) -> Any:
    """The function of a call. Operators are named, as they cannot be pickled."""
    return held(torch.ops, target) if isinstance(target, str) else target


def held(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def guard_function(guards: tuple[str, ...], names: tuple[str, ...]) -> Any:
    """The function of the arguments that says which guards hold. The texts are torch.export's, of a program
    whose code is run anyway."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # imports sympy: 0.4 s

    known = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    return eval(f"lambda {', '.join(names)}: [{', '.join(guards)}]", known)


def fits(value: Any, shape: tuple[int | None, ...] | Constant | None) -> bool:
    if shape is None:  # an integer that may vary
        return isinstance(value, (int, torch.SymInt))
    if isinstance(shape, Constant):
        return type(value) is type(shape.value) and repr(value) == repr(shape.value)  # NaN is NaN
    if not isinstance(value, Tensor):
        return False
    return len(value.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(value.shape, shape, strict=True)
    )
