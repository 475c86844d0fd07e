"""Proof: whether a group that changes a module's structure did what it says, on calibration batches.

masked   after(x) == before(x) with zeros in the columns that read what was cut
same     after(x) == before(x)
runs     after(x) has the shape of before(x), and is finite
Zeros stand where units are read, not where they are made: a batch norm makes a constant of a zero channel.
In float64, where the module runs in it: then nothing but an error is left between the two. Cost: three passes
over a few batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tersor.core.state import State
from tersor.errors import RefusedError, SiteError
from tersor.model.answers import distance, outputs, zero
from tersor.model.task import MISFIT, Task
from tersor.record.events import Cut, Group, Note

EXACT = 1e-6  # of the largest answer, in float64: what a constant in float32 inside the model may leave
ROUNDING = 256  # units in the last place of the model's own dtype, where it does not run in float64


def proved(before: State, after: State, group: Group, task: Task | None) -> tuple[bool, Note]:
    """(whether the group may stand, what is said of it)."""
    if before.given is None or task is None:
        lacks = "the model is not there" if before.given is None else "there is no task to draw batches from"
        return False, Note("", "refused", f"{group.key}: taken back: not proved, for {lacks}")
    try:
        wide = True
        try:
            was, now, want = answers(before, after, group, task, wide=True)
        except MISFIT:  # it names a dtype in its forward
            wide = False
            was, now, want = answers(before, after, group, task, wide=False)
    except (*MISFIT, RefusedError, SiteError) as error:
        text = f"{group.key}: taken back: the changed model does not run: {type(error).__name__}: {error}"
        return False, Note("", "refused", text)
    if [a.shape for a in now] != [a.shape for a in want] or not all(a.isfinite().all() for a in now):
        shapes = f"{[list(a.shape) for a in want]} became {[list(a.shape) for a in now]}"
        return False, Note("", "refused", f"{group.key}: taken back: answers of {shapes}, or not finite")
    scale = max(float(a.abs().max()) for a in was) or 1.0
    near = scale * (EXACT if wide else ROUNDING * max(torch.finfo(a.dtype).eps for a in was))
    moved, differs = distance(was, want), distance(now, want)
    data = {"differs": differs, "largest": scale, "samples": sum(len(a) for a in was if a.ndim)}
    if group.proof == "runs":
        return True, Note("", "proved", f"{group.key}: it runs, and answers on purpose otherwise", data)
    if differs > near:
        text = f"{group.key}: taken back: answers differ by {differs:.3g} of {scale:.3g} from those wanted"
        return False, Note("", "refused", text, data)
    if group.proof == "masked" and removes(before, group) and moved <= near:
        text = f"{group.key}: the proof is void: what was cut did not move the answers on these batches"
        return True, Note("", "void", text, data)
    text = f"{group.key}: answers differ by {differs:.2g} of {scale:.3g} from those wanted"
    return True, Note("", "proved", text, data)


def answers(
    before: State, after: State, group: Group, task: Task, *, wide: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the model answered before, what it answers now, and what it should."""
    was = list(outputs(before.plain(), task, wide))
    now = list(outputs(after.plain(), task, wide))
    want = was if group.proof != "masked" else list(outputs(masked(before, group), task, wide))
    return was, now, want


def masked(before: State, group: Group) -> nn.Module:
    """The model before, with zeros where what is cut is read."""
    model = before.plain()
    for cut in cuts(group):
        if cut.reads:
            places = enumerate(before.present(cut.site, cut.axis))
            zero(model, cut.site, cut.axis, [at for at, index in places if index not in set(cut.kept)])
    return model


def cuts(group: Group) -> Iterator[Cut]:
    return (event for event in group.events if isinstance(event, Cut))


def removes(before: State, group: Group) -> bool:
    """Whether anything goes: a reordering removes nothing."""
    return any(len(cut.kept) < len(before.present(cut.site, cut.axis)) for cut in cuts(group))
