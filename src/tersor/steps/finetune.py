"""Finetune: train the stored values of the compressed model.

Masks, indices, grids and the shapes of factors are kept; only leaf values change (model/trainable_forms.py).
Cost: `epochs` passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tersor.core.view import View
from tersor.model.sites import Site
from tersor.record.events import Group, Note
from tersor.setting_effects import check_effect
from tersor.settings import check
from tersor.steps.retrain import Retrain


@dataclass(frozen=True, kw_only=True)
class Finetune(Retrain):
    """Train the stored values; masks, tables and grids are kept."""

    name: ClassVar[str] = "finetune"
    epochs: float = 1.0  # passes over the training batches
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.epochs > 0, self, "epochs", "it is a number of passes: above 0")
        check_effect(self)

    def run(self, view: View) -> Iterator[Group]:
        learning = self.learning(view)
        moved, facts = view.train(self.plan(), where=learning, text=self.name)
        trained = Note("", "trained", f"{self.epochs:g} epochs", facts)
        edits = (*view.edits(moved), *self.trained_with(view, moved))
        yield Group("all", (*edits, trained, *self.left(view, moved, learning)))

    def learning(self, view: View) -> list[Site] | None:
        """The sites that learn: those of `where`, or None for all parameters, biases and norms too."""
        return None if self.where == "*" else view.weights(self.where)
