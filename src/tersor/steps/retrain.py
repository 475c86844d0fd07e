"""Retrain: the settings of steps that can train afterwards, and what they have in common.

Training is off at epochs=0. `share` mixes the teacher (the model as it was given) into the loss:
distillation repairs what a step costs, with labels or, at share=1, without them (Hinton 2015).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.forms import Form
from tersor.model.fit import OPTIMIZERS, SCHEDULES, Plan
from tersor.model.named import named
from tersor.model.sites import Site
from tersor.record.events import Edit, Note
from tersor.settings import check, check_word


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """How to train after (or while) compressing."""

    name: ClassVar[str]
    epochs: float = 0.0  # passes over the training batches; 0 does not train
    lr: float = 1e-3  # highest learning rate
    schedule: str = "cosine"  # "cosine", "linear", "step", "onecycle" or "constant"
    optimizer: str = "adamw"  # "adamw", "adam" or "sgd" (Nesterov momentum 0.9)
    weight_decay: float = 0.0
    share: float = 0.0  # of the teacher in the loss, 0 to 1
    temperature: float = 4.0  # of the soft targets
    bf16: bool = False  # forward passes in bfloat16: faster where the CPU or GPU has it
    # Convolutions in channels-last layout: faster on CPUs, for models that do not view() their outputs.
    channels_last: bool = False
    where: str | tuple[str, ...] = field(default="*")  # which sites, as a glob; "!" excludes

    def __post_init__(self) -> None:
        check(0 <= self.epochs < math.inf, self, "epochs", "it is a number of passes: 0 or more")
        check(0 < self.lr < math.inf, self, "lr", "it is a learning rate: above 0")
        check(0 <= self.share <= 1, self, "share", "it is the teacher's share of the loss: 0 to 1")
        check(0 < self.temperature < math.inf, self, "temperature", "it is a temperature: above 0")
        check(0 <= self.weight_decay < math.inf, self, "weight_decay", "it is 0 or more")
        check_word(self, "schedule", SCHEDULES)
        check_word(self, "optimizer", OPTIMIZERS)
        if not self.where:
            raise SettingError(
                f"{self.name}: where={self.where!r}, but it is a glob such as '*' or 'blocks.*'"
            )

    def plan(self) -> Plan:
        return Plan(
            self.epochs, self.lr, self.schedule, self.optimizer, self.weight_decay, self.share,
            self.temperature, bf16=self.bf16, channels_last=self.channels_last,
        )  # fmt: skip

    def retrained(
        self, view: View, edits: Mapping[str, Edit]
    ) -> tuple[dict[str, Form], tuple[Edit | Note, ...]]:
        """Train with these edits in force: the forms after it, and the events of all that moved."""
        forms = {site: cast(Form, edit.after) for site, edit in edits.items()}
        begin = {site: view.forms[site] for site in edits}
        moved, facts = view.train(self.plan(), forms=forms, begin=begin, text=self.name)
        after = forms | moved
        hows = {site: edit.how for site, edit in edits.items()}
        found = [Edit(s, view.forms[s], after[s], hows.get(s, "refine")) for s in view.sites if s in after]
        return after, (*found, Note("", "trained", f"{self.epochs:g} epochs", facts))

    def left(
        self, view: View, moved: Mapping[str, Form], learning: Sequence[Site] | None
    ) -> tuple[Note, ...]:
        """A word on each weight that was to learn and did not, such as one that is zero everywhere."""
        sites = list(view.sites.values()) if learning is None else learning
        return tuple(
            Note(site.name, "skipped", "training left it as it was")
            for site in sites
            if site.is_weight and site.name not in moved
        )

    @property
    def needs(self) -> Needs:
        """Without training each site can be done alone, without the others and without the model."""
        if not self.epochs:
            return Needs.NOTHING
        loss = Needs.LOSS if self.share < 1 else Needs.NOTHING  # a teacher alone needs no targets
        soft = Needs.SOFT if self.share > 0 else Needs.NOTHING
        return Needs.TRAINING | Needs.WHOLE | loss | soft


def check_teacher(step: Any) -> None:
    if not isinstance(step.teacher, (str, nn.Module)):
        raise SettingError(
            f"{step.name}: teacher={step.teacher!r}, but it is '' (the given model), 'file.py:factory' or a "
            "module"
        )


def teacher_of(given: Any, view: View) -> nn.Module:
    """The teacher that a setting names: "" is the model as it was given. A module is copied, for training
    moves it and puts it in eval mode."""
    if isinstance(given, nn.Module):
        return copy.deepcopy(given)
    return named(given, "teacher", SettingError, nn.Module) if given else view.base()
