"""Slim penalty: train while the units that are to be cut shrink to zero, so that the cut takes little away.

The units are those that the cut will remove, in all of their slices: what makes them, their norms and biases,
and what reads them (maths/group_penalty.py). Their choice is made before, by slim's budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from tersor.core.view import View
from tersor.maths.group_penalty import shrink, strength, units_mask
from tersor.model.channels.own_module import Plan
from tersor.model.trainable_forms import TrainableForms
from tersor.model.training_loop import TrainingPlan
from tersor.record.events import Group, Note


class Shrinking:
    """The training hook that shrinks these elements of these sites."""

    def __init__(self, masks: dict[str, Tensor], penalty: float):
        self.masks, self.penalty = masks, penalty

    def __call__(self, tuned: TrainableForms, step: int, total: int) -> None:
        lambda_ = strength(step, total, self.penalty)
        for name in tuned.learning:
            if name in self.masks and (weights := floats_of(tuned, name)) is not None:
                shrink(weights, self.masks[name].to(weights.device), lambda_)


def floats_of(tuned: TrainableForms, name: str) -> Tensor | None:
    """The float weights that a site's part trains, of the site's shape; None for a form without them, as a
    product or a codebook."""
    shape = tuple(tuned.part_of(name).value().shape)
    found: list[Any] = [getattr(module, "w", None) for module in tuned.part_of(name).modules()]
    return next((w for w in found if isinstance(w, Tensor) and tuple(w.shape) == shape), None)


def masks_of(view: View, plan: Plan) -> dict[str, Tensor]:
    """The elements of parameters that a cut takes away."""
    kept: dict[str, dict[int, Any]] = {}
    for (name, axis), some in plan.cuts.items():
        if view.sites[name].is_parameter:
            kept.setdefault(name, {})[axis] = some
    return {name: units_mask(view.shape(name), axes) for name, axes in kept.items()}


def shrunk(view: View, plan: Plan, training: TrainingPlan, penalty: float, key: str) -> Group:
    """The edits of a training in which the units of this cut shrink."""
    masks = masks_of(view, plan)
    moved, facts = view.train(
        training, on_step=Shrinking(masks, penalty), text=f"{view.step_name}, {key}", key=key
    )

    def norm(forms: Any) -> float:
        return sum(float(forms[n].decode().double()[masks[n]].square().sum()) for n in masks) ** 0.5

    before, after = norm(view.forms), norm({**view.forms, **moved})
    share = after / max(before, 1e-300)
    text = f"{training.epochs:g} epochs; the units to be cut shrink to {share:.2g} of their norm"
    facts = {**facts, "norm_before": before, "norm_after": after}
    return Group(key, (*view.edits(moved), Note("", "shrunk", text, facts)))


def parts(plan: TrainingPlan, before: float) -> tuple[TrainingPlan, TrainingPlan]:
    """A training before the cut and one after it, with the epochs of one."""
    return replace(plan, epochs=plan.epochs * before), replace(plan, epochs=plan.epochs * (1 - before))
