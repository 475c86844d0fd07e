"""Outside: what a model reads of its parts while none runs: their tensors, and values computed inside.

A part is compared by its outputs. A hook, an attribute or a second call of an inner module may carry more out
of it, and then a change that keeps the outputs is not one that keeps the model.
Cost: one forward of the whole model.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tersor.model.outputs import parts_of


class Outside(TorchFunctionMode):
    """Notes tensors of parts that functions read while none of the parts runs: their own, and those computed
    inside that are no output, which a hook or an attribute may carry out."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.found: dict[str, str] = {}  # tensor -> function
        self.running = list[str]()
        self.made: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # computed inside: the tensor, its module
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.modules = [model.get_submodule(name) for name in names]
        self.own = {
            id(tensor): f"{name}.{key}"
            for name, module in zip(names, self.modules, strict=True)
            for each in (module.named_parameters(), module.named_buffers()) for key, tensor in each
        }  # fmt: skip

    def __enter__(self) -> Self:
        inside = list({id(each): each for module in self.modules for each in module.modules()}.values())
        self.handles = [each.register_forward_pre_hook(self.enter, prepend=True) for each in inside]
        self.handles += [each.register_forward_hook(self.leave, always_call=True) for each in inside]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def enter(self, module: nn.Module, _: Any) -> None:
        if self.running or any(module is each for each in self.modules):
            self.running.append(self.paths[id(module)])

    def leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.running:
            self.running.pop()
        if not self.running:
            for leaf in inside_of(output):
                self.made.pop(id(leaf), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self.running:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}  # what is written in place stays given
            fresh = [leaf for leaf in made if id(leaf) not in given and id(leaf) not in self.own]
            self.made |= {id(leaf): (weakref.ref(leaf), self.running[-1]) for leaf in fresh}
        elif made:  # shapes, dtypes and devices may be read anywhere
            for leaf in tree_leaves((args, kwargs)):
                if name := self.name(leaf):
                    self.found.setdefault(name, getattr(func, "__name__", str(func)))
        return out

    def name(self, value: Any) -> str:
        """What a value is of a part; "" if nothing."""
        if id(value) in self.own:
            return self.own[id(value)]
        tensor, path = self.made.get(id(value), (None, ""))
        return f"a tensor computed in {path}" if tensor is not None and tensor() is value else ""


def inside_of(output: Any) -> list[Any]:
    """What an output consists of; of an object of a class of the user's own, its attributes."""
    if isinstance(output, Tensor):
        return [output]
    if parts := parts_of(output):
        return [leaf for part in parts.values() for leaf in inside_of(part)]
    return tree_leaves(list(getattr(output, "__dict__", {}).values()))
