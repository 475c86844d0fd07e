"""Retrain: the base of all steps that can train: their settings and their code.

epochs=0 does not train. `teacher_weight` mixes the teacher (the model as it was given) into the loss:
distillation recovers accuracy, with labels or, at teacher_weight=1, without them (Hinton 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

from torch import nn

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.forms import Form
from tersor.model.changed_copy import changed_structure, own_copy
from tersor.model.frozen import FROZEN, Frozen, frozen_in
from tersor.model.grid_part import outdated
from tersor.model.learning_rates import MOST, factors_of
from tersor.model.sites import Site
from tersor.model.training_loop import OPTIMIZERS, SCHEDULES, TrainingPlan
from tersor.record.events import Edit, Note
from tersor.setting_effects import Above, Only
from tersor.settings import check, check_settings, check_word
from tersor.zoo.words import load_weights, network_of

TRAINING = (
    "lr", "schedule", "optimizer", "weight_decay", "teacher_weight", "bf16", "channels_last",
    "max_grad_norm", "lr_of", "frozen",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """The settings of training after (or while) compressing."""

    name: ClassVar[str]
    only: ClassVar[Only] = {
        **dict.fromkeys(TRAINING, {"epochs": Above(0)}),
        "temperature": {"teacher_weight": Above(0)},
    }
    epochs: float = 0.0  # passes over the training batches; 0 does not train
    lr: float = 1e-3  # highest learning rate
    schedule: str = "cosine"  # "cosine", "linear", "step", "onecycle" or "constant"
    optimizer: str = "adamw"  # "adamw", "adam" or "sgd" (Nesterov momentum 0.9)
    weight_decay: float = 0.0
    teacher_weight: float = 0.0  # weight of the teacher in the loss, 0 to 1
    temperature: float = 4.0  # of the soft targets
    bf16: bool = False  # forward passes in bfloat16: faster if the CPU or GPU supports it
    # Convolutions in channels-last layout: faster on CPUs, for models that do not view() their outputs.
    channels_last: bool = False
    max_grad_norm: float | None = None  # largest norm of all gradients together; none: no clipping
    # Globs of weights with factors of lr: "head.*=10,*.bias=0.5"; in YAML and Python also {"head.*": 10}.
    lr_of: Any = ""
    # What the model has frozen (requires_grad=False, modules in eval mode): "stay" frozen, or "train".
    frozen: str = "stay"
    where: str | tuple[str, ...] = field(default="*")  # which sites, as a glob; "!" excludes

    def __post_init__(self) -> None:
        check_settings(self)
        check(0 <= self.epochs <= MOST, self, "epochs", "it is a number of passes: 0 or more, up to 1e6")
        check(0 < self.lr <= MOST, self, "lr", "it is a learning rate: above 0, up to 1e6")
        check(
            0 <= self.teacher_weight <= 1,
            self,
            "teacher_weight",
            "it is the teacher's weight in the loss: 0 to 1",
        )
        check(0 < self.temperature <= MOST, self, "temperature", "it is a temperature: above 0, up to 1e6")
        check(0 <= self.weight_decay <= MOST, self, "weight_decay", "it is 0 or more, up to 1e6")
        check_word(self, "schedule", SCHEDULES)
        check_word(self, "optimizer", OPTIMIZERS)
        check_word(self, "frozen", FROZEN)
        check(
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            self,
            "max_grad_norm",
            "it is a norm: above 0",
        )
        object.__setattr__(self, "lr_of", factors_of(self.lr_of, self.name))

    def plan(self) -> TrainingPlan:
        return TrainingPlan(
            self.epochs, self.lr, self.schedule, self.optimizer, self.weight_decay, self.teacher_weight,
            self.temperature, bf16=self.bf16, channels_last=self.channels_last,
            max_grad_norm=self.max_grad_norm, lr_of=self.lr_of, frozen=self.frozen,
        )  # fmt: skip

    def still(self, view: View) -> Frozen:
        """The frozen tensors and modules of the current model."""
        given = view.state.given
        found = (
            Frozen() if given is None else frozen_in(changed_structure(given, view.state.changes), view.sites)
        )
        return found if self.frozen == "stay" else Frozen(outside=found.outside)

    def stayed(self, view: View, learning: Sequence[Site] | None = None) -> tuple[Note, ...]:
        """A note on tensors that are frozen or of a dtype that is not trained. If `learning` is given, only
        on these sites."""
        found = self.still(view)
        if learning is not None:
            names = {site.name for site in learning}
            found = replace(found, tensors=tuple(name for name in found.tensors if name in names), outside=())
        text, data = found.summary()
        return (Note("", "frozen", text, data),) if text else ()

    def retrained(
        self, view: View, edits: Mapping[str, Edit]
    ) -> tuple[dict[str, Form], tuple[Edit | Note, ...]]:
        """Train with these edits applied. Returns the forms after it, and the events of everything that
        changed."""
        forms = {site: cast(Form, edit.after) for site, edit in edits.items()}
        begin = {site: view.forms[site] for site in edits}
        moved, facts = view.train(self.plan(), forms=forms, begin=begin, text=self.name)
        after = forms | moved
        hows = {site: edit.how for site, edit in edits.items()}
        found = [Edit(s, view.forms[s], after[s], hows.get(s, "refine")) for s in view.sites if s in after]
        trained = Note("", "trained", f"{self.epochs:g} epochs", facts)
        return after, (*found, *self.trained_with(view, after), trained, *self.stayed(view))

    def trained_with(self, view: View, moved: Mapping[str, Form]) -> tuple[Edit, ...]:
        """Edits that keep the grids of edges: they were simulated while the weights learned, and an edit of a
        weight has made them stale."""
        grids = view.state.grids if moved else {}
        return tuple(
            Edit(edge, stale, grid, "refine") for edge, grid in grids.items()
            if (stale := outdated(grid)) is not grid
        )  # fmt: skip

    def left(
        self, view: View, moved: Mapping[str, Form], learning: Sequence[Site] | None
    ) -> tuple[Note, ...]:
        """Notes on weights that should have learned and did not, such as one that is zero everywhere, and on
        frozen ones."""
        sites = list(view.sites.values()) if learning is None else learning
        still = self.still(view).tensors
        notes = (
            Note(site.name, "skipped", "training left it as it was")
            for site in sites
            if site.is_weight and site.name not in moved and site.name not in still
        )
        return (*notes, *self.stayed(view, learning))

    @property
    def needs(self) -> Needs:
        """Without training, each site is compressed alone, without the others and without the model."""
        if not self.epochs:
            return Needs.NOTHING
        loss = Needs.LOSS if self.teacher_weight < 1 else Needs.NOTHING  # only soft targets need no labels
        soft = Needs.SOFT if self.teacher_weight > 0 else Needs.NOTHING
        return Needs.TRAINING | Needs.WHOLE | loss | soft


def check_teacher(step: Any) -> None:
    if not isinstance(step.teacher, (str, nn.Module)):
        raise SettingError(
            f"{step.name}: teacher={step.teacher!r}, but it is '' (the given model), 'file.py:factory', the "
            "words of a model such as 'zoo:resnet18', or a module"
        )


def teacher_of(step: Any, view: View) -> nn.Module:
    """The teacher that a step names: "" is the model as it was given. A module is copied, since training
    moves it to a device and puts it in eval mode."""
    given = step.teacher
    if not given:
        return view.base()
    teacher = own_copy(given) if isinstance(given, nn.Module) else network_of(given, "teacher")
    if step.teacher_file:
        load_weights(teacher, step.teacher_file, "teacher_file")
    return teacher
