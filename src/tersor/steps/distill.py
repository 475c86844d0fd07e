"""Distill: train the compressed model to match the outputs of a teacher.

loss = (1 - a) * task loss + a * T^2 * KL(teacher / T || student / T)           Hinton, Vinyals, Dean 2015
     + feature_weight * a distance of the named layers' outputs                 model/feature_loss.py
a is `teacher_weight`, T the temperature. The teacher is the model as it was given, or another one, of another
architecture too. Masks, tables and grids stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tersor.core.view import View
from tersor.errors import SettingError, did_you_mean
from tersor.model.feature_loss import FEATURE_LOSSES
from tersor.model.features import pairs_of
from tersor.model.learning_rates import MOST
from tersor.record.events import Group, Note
from tersor.setting_effects import GIVEN, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.finetune import Finetune
from tersor.steps.retrain import check_teacher, teacher_of


@dataclass(frozen=True, kw_only=True)
class Distill(Finetune):
    """Train towards a teacher's outputs: soft targets, features, or both."""

    name: ClassVar[str] = "distill"
    only: ClassVar[Only] = {
        **dict.fromkeys(("feature_weight", "feature_loss"), {"features": GIVEN}),
        "teacher_file": {"teacher": GIVEN},
    }
    teacher_weight: float = 0.7  # weight of the teacher in the loss, 0 to 1
    lr: float = 1e-3
    teacher: Any = ""  # "": the model as it was given; "file.py:factory", "zoo:NAME"; in Python a module
    teacher_file: str = ""  # the teacher's weights, a .safetensors file
    features: str = ""  # layers whose outputs are matched: "a,b", or "a,b=c" if b is c in the teacher
    feature_weight: float = 1.0  # weight of the features in the loss
    feature_loss: str = "outputs"  # "outputs", "attention" (where maps are active) or "relation" (of samples)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher(self)
        check(0 <= self.feature_weight <= MOST, self, "feature_weight", "it is 0 or more, up to 1e6")
        check_word(self, "feature_loss", FEATURE_LOSSES)
        named = all(mine and theirs for mine, theirs in pairs_of(self.features))
        check(named, self, "features", "it is names of layers with commas, 'a', or 'a=b' of the teacher's b")
        if self.teacher_weight == 0 and not self.features:
            raise SettingError(
                "distill: teacher_weight=0 without features leaves the teacher out; "
                "give teacher_weight or use finetune"
            )
        check_effect(self)

    def run(self, view: View) -> Iterator[Group]:
        teacher = teacher_of(self, view)
        sides = [
            (side, dict(model.named_modules(remove_duplicate=False)))
            for side, model in (("model", view.plain()), ("teacher", teacher))
        ]
        for pair in pairs_of(self.features):
            for name, (side, layers) in zip(pair, sides, strict=True):
                if name not in layers:
                    raise SettingError(
                        f"distill: features: the {side} has no layer {name!r}; {did_you_mean(name, layers)}"
                    )
        plan = replace(
            self.plan(), features=self.features, feature_weight=self.feature_weight,
            feature_loss=self.feature_loss,
        )  # fmt: skip
        learning = self.learning(view)
        moved, facts = view.train(plan, where=learning, teacher=teacher, text=self.name)
        trained = Note("", "trained", f"{self.epochs:g} epochs of distillation", facts)
        edits = (*view.edits(moved), *self.trained_with(view, moved))
        yield Group("all", (*edits, trained, *self.left(view, moved, learning)))
