"""Proof: check on calibration batches that a group that changes a module's structure changes it as stated.

masked   after(x) == before(x) with zeros in the columns that read what was cut
counted  the same, and each normalizer sees only the kept units: model/channels/counted_run.py
zeroed   after(x) == before(x) with zeros on edges, where a residual branch ended: model/zeroed_edges.py
same     after(x) == before(x)
runs     after(x) runs, and returns tensors of the shapes and dtypes of before(x)
Zeros are put where cut units are read, not where they are made: a batch norm turns a zero channel into a
constant. Outputs are compared in float64 if the module runs in it, so that only an error can make them
differ, and once in its own precision. A second proof uses weights moved at random: a unit that is dead on
these batches would hide a wrong pairing. If all that changes is inside of a part that the task names, the
part's outputs are compared; the whole model then has to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.state import State
from tersor.errors import RefusedError, SiteError
from tersor.forms import Dense
from tersor.model.channels.counted_run import CountedRun
from tersor.model.output_comparison import Verdict, judged, once, shaken, zero
from tersor.model.part import part_of
from tersor.model.task import MISFIT, Task
from tersor.model.zeroed_edges import with_zeros
from tersor.record.events import Cut, Edit, Group, Note, Set


def proved(before: State, group: Group, task: Task | None, who: str) -> tuple[bool, Note]:
    """(whether the group is accepted, a note on it)."""
    if before.given is None or task is None or not task.parts or not all(map(task.in_part, places(group))):
        return compared(before, group, task, who)
    given, its = part_of(before.given, task, before.plain)
    accepted, note = compared(replace(before, given=given), group, its, who)
    try:
        if accepted:
            with torch.no_grad():
                once(task, apply(before, group, who)[0].plain().eval(), task.shown)
    except (*MISFIT, RefusedError, SiteError) as error:
        why = f"not kept: the part runs, and the whole model does not: {type(error).__name__}: {error}"
        return False, Note("", "refused", f"{group.key}: {why}")
    return accepted, note


def places(group: Group) -> list[str]:
    """What its events change: weights, edges and modules."""
    changes = [event for event in group.events if not isinstance(event, Note)]
    return [each.site if isinstance(each, (Edit, Cut)) else each.module for each in changes]


def compared(before: State, group: Group, task: Task | None, who: str) -> tuple[bool, Note]:
    """`proved`, on the outputs of the state's module."""
    kind, why, data = "refused", "", {}
    try:
        if before.given is None or task is None:
            why = (
                f"not proved: there is no {'model' if before.given is None else 'task to draw batches from'}"
            )
        elif any("parametrizations." in cut.site for cut in cuts(group) if cut.reads):
            why = "not proved: a parametrization recomputes a weight that reads the cut units"
        else:
            found = [verdict_of(before, group, task, who)]
            if group.proof == "zeroed" or all(isinstance(event, (Cut, Set, Note)) for event in group.events):
                found.append(verdict_of(moved_at_random(before), group, task, who))
            data = {"differs": max(v.differs for v in found), "largest": found[0].largest}
            if not all(v.fits for v in found):
                why = f"outputs differ by {data['differs']:.3g} of {data['largest']:.3g} from those expected"
            elif (
                group.proof == "zeroed" or (group.proof in ("masked", "counted") and removes(before, group))
            ) and not any(v.moved for v in found):
                kind, why = "void", "the proof is void: what is removed does not change the outputs"
    except (*MISFIT, RefusedError, SiteError) as error:
        named = f"the changed model does not run: {type(error).__name__}: "
        why = f"{'' if isinstance(error, RefusedError) else named}{error}"
    if why:
        return False, Note("", kind, f"{group.key}: not kept: {why}", data)
    text = "it runs; its outputs are meant to differ" if group.proof == "runs" else (
        f"outputs differ by {data['differs']:.2g} of {data['largest']:.3g} from those expected"
    )  # fmt: skip
    return True, Note("", "proved", f"{group.key}: {text}", data)


def verdict_of(before: State, group: Group, task: Task, who: str) -> Verdict:
    after = apply(before, group, who)[0]
    wanted = {
        "masked": lambda: masked(before, group), "same": before.plain,
        "counted": lambda: counted(before, group), "zeroed": lambda: with_zeros(before.plain(), group.zeros),
    }.get(group.proof)  # fmt: skip
    return judged(before.plain, after.plain, wanted, task)


def moved_at_random(state: State) -> State:
    values = shaken({name: form.decode() for name, form in state.forms.items()}, state.sites)
    return replace(state, forms={name: Dense(value) for name, value in values.items()})


def masked(before: State, group: Group) -> nn.Module:
    """The model before the group, with zeros where cut units are read."""
    model = before.plain()
    for cut in cuts(group):
        if cut.reads:
            places = enumerate(before.present(cut.site, cut.axis))
            zero(model, cut.site, cut.axis, [at for at, index in places if index not in set(cut.kept)])
    return model


def counted(before: State, group: Group) -> nn.Module:
    """The same, evaluated so that normalizers count only the kept units."""
    places = {}
    for cut in cuts(group):
        place = {index: at for at, index in enumerate(before.present(cut.site, cut.axis))}
        places[cut.site, cut.axis] = [place[index] for index in cut.kept]
    return CountedRun(before.plain(), places)


def cuts(group: Group) -> Iterator[Cut]:
    return (event for event in group.events if isinstance(event, Cut))


def removes(before: State, group: Group) -> bool:
    """Whether the group removes any index. A reordering removes none."""
    return any(len(cut.kept) < len(before.present(cut.site, cut.axis)) for cut in cuts(group))
