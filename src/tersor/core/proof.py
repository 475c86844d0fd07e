"""Proof: whether a group that changes a module's structure did what it says, on calibration batches.

masked   after(x) == before(x) with zeros in the columns that read what was cut
same     after(x) == before(x)
runs     after(x) runs, and has the tensors of before(x)
Zeros stand where units are read, not where they are made: a batch norm makes a constant of a zero channel.
In float64, where the module runs in it: then nothing but an error is left between the two; once more in its
own precision; and on weights moved at random, for a unit that is dead on these batches hides what it is
paired with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from tersor.core.apply import apply
from tersor.core.state import State
from tersor.errors import RefusedError, SiteError
from tersor.forms import Dense
from tersor.model.answers import Verdict, judged, shaken, zero
from tersor.model.task import MISFIT, Task
from tersor.record.events import Cut, Group, Note, Set


def proved(before: State, group: Group, task: Task | None, who: str) -> tuple[bool, Note]:
    """(whether the group may stand, what is said of it)."""
    kind, why, data = "refused", "", {}
    try:
        if before.given is None or task is None:
            why = (
                f"not proved: there is no {'model' if before.given is None else 'task to draw batches from'}"
            )
        elif any("parametrizations." in cut.site for cut in cuts(group) if cut.reads):
            why = "not proved: a parametrization computes anew what reads the cut units"
        else:
            found = [verdict_of(before, group, task, who)]
            if all(isinstance(event, (Cut, Set, Note)) for event in group.events):
                found.append(verdict_of(moved_at_random(before), group, task, who))
            data = {"differs": max(v.differs for v in found), "largest": found[0].largest}
            if not all(v.fits for v in found):
                why = f"answers differ by {data['differs']:.3g} of {data['largest']:.3g} from those wanted"
            elif group.proof == "masked" and removes(before, group) and not any(v.moved for v in found):
                kind, why = "void", "the proof is void: what is cut does not move the answers"
    except (*MISFIT, RefusedError, SiteError) as error:
        why = f"the changed model does not run: {type(error).__name__}: {error}"
    if why:
        return False, Note("", kind, f"{group.key}: taken back: {why}", data)
    said = "it runs, and answers on purpose otherwise" if group.proof == "runs" else (
        f"answers differ by {data['differs']:.2g} of {data['largest']:.3g} from those wanted"
    )  # fmt: skip
    return True, Note("", "proved", f"{group.key}: {said}", data)


def verdict_of(before: State, group: Group, task: Task, who: str) -> Verdict:
    after = apply(before, group, who)[0]
    wanted = {"masked": lambda: masked(before, group), "same": before.plain}.get(group.proof)
    return judged(before.plain, after.plain, wanted, task)


def moved_at_random(state: State) -> State:
    values = shaken({name: form.decode() for name, form in state.forms.items()}, state.sites)
    return replace(state, forms={name: Dense(value) for name, value in values.items()})


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
