"""Graph hooks: forward hooks of an fx.GraphModule, and its plain attributes, which its deepcopy drops.

A copy without them is another function: without the user's hook, or without the grid on an input. Hooks read
attributes: that of an exported program asks for `validate_inputs`. A _deepcopy_hook of the module puts them
back, in its copies and in theirs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


class Kept:
    """The hooks of one module. deepcopy copies this object with the module, then calls the first one with the
    copy: its hooks are those of the copied object, so methods of modules are those of their copies."""

    def __init__(self, module: nn.Module):
        self.hooks: dict[str, Any] = {key: vars(module)[key] for key in HOOKS if key in vars(module)}
        self.attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}

    def __call__(self, module: Any) -> None:
        for mine in module._deepcopy_hooks:
            if isinstance(mine, Kept):
                mine.put(module)

    def put(self, module: nn.Module) -> None:
        vars(module).update(self.attributes | vars(module) | self.hooks)


def keep_hooks(model: nn.Module) -> None:
    """From now on copies of this module, a private one, have its hooks."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule) and not any(
            isinstance(hook, Kept) for hook in module._deepcopy_hooks
        ):
            module._register_deepcopy_hook(Kept(module))


def restore_hooks(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put the hooks of the model's graph modules into its copy, which deepcopy has made with `memo`."""
    for module in model.modules():
        twin = memo.get(id(module))
        if isinstance(module, fx.GraphModule) and isinstance(twin, fx.GraphModule):
            copy.deepcopy(Kept(module), memo).put(twin)
            keep_hooks(twin)
