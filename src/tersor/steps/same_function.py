"""Same function: a group that changes a module's structure and keeps its outputs, up to float rounding.

The executor's proof compares the smallest outputs too. Where terms cancel there, the weights' float32 is too
coarse for it. Such a group is made if no output moves by more than ROUNDING of the largest, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from tersor.core.view import View
from tersor.model.batches import MISFIT
from tersor.model.output_comparison import outputs
from tersor.record.events import Group, Note

ROUNDING = 1e-5  # of the largest output
RESIDUE = 1e-6  # of the largest output: another output as small as this holds rounding


def same_function(view: View, group: Group, what: str) -> Generator[Group, None, tuple[View | None, float]]:
    """Yield a group with the proof "same". Returns the view after it, or None, and by how much of the largest
    output it moves the outputs: 0 if the proof passed. `what` the group does, in a word."""
    yield group
    if group.key not in view.refused:
        return view.after(group), 0.0
    moved = difference(view, group)
    if moved > ROUNDING:
        return None, moved
    text = f"{what}: kept all the same; outputs move by {moved:.1g} of the largest, as by float rounding"
    note = Note("", "rounded", text, {"relative": moved})
    group = replace(group, key=f"{group.key}, rounded", proof="runs", events=(*group.events, note))
    yield group
    return (None if group.key in view.refused else view.after(group)), moved


def difference(view: View, group: Group) -> float:
    """How far a group moves the outputs for calibration batches, relative to the largest: in float64, or in
    float32 if the forward fixes that. Infinite if the model runs in neither, or if a dtype changes."""
    after = view.after(group)
    with suppress(*MISFIT):
        own = [outputs(each.part.plain(), view.part.task, "own") for each in (view, after)]
        if [x.dtype for x in own[0]] != [x.dtype for x in own[1]]:
            return math.inf
    for width in ("double", "float"):
        with suppress(*MISFIT):
            return moved_by(*(outputs(each.part.plain(), view.part.task, width) for each in (view, after)))
    return math.inf


def moved_by(was: list[Tensor], now: list[Tensor]) -> float:
    """The largest difference in an output, relative to the largest number of that output before: a large
    output must not hide what happens to another. One that is RESIDUE of the largest output is rounding."""
    pairs = [(x, y) for x, y in zip(was, now, strict=True) if x.numel()]
    least = RESIDUE * max((float(x.abs().max()) for x, _ in pairs), default=0.0)
    return max((moved(x, y, least) for x, y in pairs), default=math.inf)


def moved(x: Tensor, y: Tensor, least: float) -> float:
    largest, apart = max(float(x.abs().max()), least), float((x - y).abs().max())
    return apart / largest if largest else (math.inf if apart else 0.0)
