"""Trainable: a state's model for a training loop of one's own, with all that was decided in force.

forward       the model's own signature; masks, tables, grids, factors and grids on edges are in force
parameters()  the leaves of forms and the scales of grids on edges: any optimizer, any trainer
It pickles, copies, moves and synchronises as other modules do. steps/trained.py makes it and folds it back.
"""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from tersor.errors import SettingError
from tersor.model.checkpointing import rerun
from tersor.model.frozen import Frozen
from tersor.model.trainable import TrainableForms
from tersor.model.wrapped import inside

# What trainers ask a model for besides a forward: a Hugging Face configuration, gradient checkpointing.
HANDED_ON = (
    "config", "gradient_checkpointing_enable", "gradient_checkpointing_disable",
    "activation_checkpointing_enable", "activation_checkpointing_disable", "is_gradient_checkpointing",
    "supports_gradient_checkpointing",
)  # fmt: skip


class Source:
    """The state that a module was made from. It is never changed, so copies of the module share it."""

    def __init__(self, state: Any):
        self.state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Trainable(TrainableForms):
    """A Tuned that knows where it comes from."""

    source: Source
    frozen: Frozen
    zeros: str  # which weights' zeros stay, as in a recipe

    def __getattr__(self, name: str) -> Any:
        """What trainers ask for and the net has; nothing else: its methods would run on its own weights."""
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


def unwrapped(module: Any) -> Trainable:
    """The Trainable in what trainers wrap around it; SettingError where there is none."""
    if isinstance(inner := inside(module), Trainable):
        return inner
    part = isinstance(module, nn.Module) and any(isinstance(one, Trainable) for one in module.modules())
    way = "Give the part of it that trainable(...) made" if part else "Give what trainable(...) made"
    raise SettingError(
        f"folded: given a {type(module).__name__}, but it folds a module in training back to a state. {way}"
    )
