"""Trainable module: the module that a user trains in a loop of their own, made of a state.

forward       the model's own signature; computes with masks, codebooks, factors and grids on edges
parameters()  the leaves of forms and the scales of grids on edges, for any optimizer and trainer
It can be pickled, copied, moved and synchronized like other modules.
steps/own_training.py makes it and folds it back to a state.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError
from tersor.model.checkpointing import rerun
from tersor.model.frozen import Frozen
from tersor.model.kinds import unfit
from tersor.model.simulate import key
from tersor.model.trainable_forms import TrainableForms
from tersor.model.wrapped import inside

# Attributes that trainers read besides forward: a Hugging Face configuration, gradient checkpointing.
HANDED_ON = (
    "config", "gradient_checkpointing_enable", "gradient_checkpointing_disable",
    "activation_checkpointing_enable", "activation_checkpointing_disable", "is_gradient_checkpointing",
    "supports_gradient_checkpointing",
)  # fmt: skip


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # what half() and such change


class Source:
    """The state that a module was made from. States do not change, so copies of the module share it."""

    def __init__(self, state: Any):
        self.state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Trainable(TrainableForms):
    """A TrainableForms with the state that it was made from."""

    source: Source
    frozen: Frozen
    zeros: str  # glob of the weights whose zeros stay, as in a recipe
    made: dict[tuple[str, str], Tensor]  # (path of a module, name of its tensor) -> its kind, without values

    def remember(self) -> None:
        """Remember which tensors there are. A loop gives them other values, and nothing else."""
        self.made = {
            (path, name): tensor.detach().to("meta")
            for path, module in self.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and path.split(".")[0] != "net"
        }

    def check_whole(self) -> None:
        """RefusedError if a tensor that `fold` reads is gone, or differs in more than its values."""
        for (path, name), made in self.made.items():
            found = getattr(self.get_submodule(path), name, None)
            if why := "was removed" if found is None else differs(found, made):
                where = f"{path}.{name}" if path else name
                known = (*self.sites, *self.table)
                site = next((site for site in known if key(site) in where.split(".")), where)
                raise RefusedError(
                    f"folded: {site}: its tensor {where} {why}. Fold the module that trainable(...) made, "
                    "with other values in the same tensors"
                )

    def __getattr__(self, name: str) -> Any:
        """The net's attribute if it is in HANDED_ON. Not others: the net's methods use its own weights."""
        if name not in HANDED_ON or "net" not in self.__dict__ or not hasattr(self.net, name):
            return super().__getattr__(name)
        found = getattr(self.net, name)
        if not name.endswith("_enable"):
            return found

        def enable(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            rerun(self.net)
            return result

        return enable


def differs(found: Any, made: Tensor) -> str:
    """How a tensor differs from what it was, but for its values; "" if it does not."""
    if why := unfit(found):
        return f"is {why}"
    if found.shape != made.shape:
        return f"has the shape {list(found.shape)}, and had {list(made.shape)}"
    same = found.dtype is made.dtype or {found.dtype, made.dtype} <= FLOATS
    return "" if same else f"is {found.dtype}, and was {made.dtype}"


def unwrapped(module: Any) -> Trainable:
    """The Trainable inside a trainer's wrappers; SettingError if there is none."""
    if isinstance(inner := inside(module), Trainable):
        return inner
    part = isinstance(module, nn.Module) and any(isinstance(child, Trainable) for child in module.modules())
    advice = "Give the submodule that trainable(...) made" if part else "Give what trainable(...) made"
    raise SettingError(
        f"folded: given a {type(module).__name__}, but it folds a module that trainable(...) made. {advice}"
    )
