"""Check: what a recipe will do, need and lose, before anything runs.

The recipe runs on a stand-in with small random weights, and only training is left out. The warnings about
steps that absorb the result of another therefore come from the steps and forms themselves. With a model, the
stand-in has the model's names and kinds, and at most 64 elements along each axis. Cost: seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.run import Executor
from tersor.core.state import State, start
from tersor.core.view import View
from tersor.errors import RefusedError
from tersor.forms import FORMS, Form, Node
from tersor.model.grid_order import changes_ranges
from tersor.model.needs import Needs
from tersor.model.sites import Site, select
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms
from tersor.model.training_loop import TrainingPlan
from tersor.record.events import Cut, Edit, Event, Group, Note
from tersor.record.observer import Observer
from tersor.record.skipped import LEFT
from tersor.report.facts import unusual
from tersor.settings import settings_of
from tersor.standin import stand_in, stand_in_for

LEAVES = {"dense", "coded"}
TASK = "a task"
EXAMPLE = "a task with an example of the model's inputs; no data, except to smooth"

Facts = dict[str, Any]
Makers = dict[tuple[str, str], str]  # (site, kind of form) -> the step that made it


@dataclass
class DryView(View):
    """A view that trains nothing and reports which missing inputs a step asks for."""

    @property
    def task(self) -> Task:
        self.lacks(TASK, again=False)
        raise RefusedError(f"{self.step_name}: needs a task")

    def train(
        self, plan: TrainingPlan, *, forms: Mapping[str, Form] | None = None,
        where: Iterable[Site] | None = None,
        on_step: Callable[[TrainableForms, int, int], None] | None = None, **more: Any,
    ) -> tuple[dict[str, Form], dict[str, float]]:  # fmt: skip
        """The result of a training that changes no values. The hook runs for two steps, so that masks
        narrow."""
        self.lacks("a task with training batches")
        learn = [s.name for s in (self.sites.values() if where is None else where) if s.is_parameter]
        tuned = TrainableForms(
            self._module(), {**self.forms, **(forms or {})}, self.sites, learn, more.get("makers")
        )
        if on_step is not None:
            on_step(tuned, 0, 1)
            on_step(tuned, 1, 1)
        return {n: form for n, form in tuned.fold().items() if form.digest != self.forms[n].digest}, {}

    def lacks(self, what: str, again: bool = True) -> None:
        if isinstance(self.observer, Recorder) and (again or self.observer.needs is None):
            self.observer.needs = what


class Recorder(Observer):
    """Keep the applied events, and the input that a step asked for and a dry run does not have."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.needs: str | None = None
        self.events: list[Event] = []
        self.left: list[str] = []  # sites that a step skips because of their dtype

    def applied(self, group: Group) -> None:
        if group.key == LEFT:
            self.left += [f"{note.site}: {note.text}" for note in group.events if isinstance(note, Note)]
        else:
            self.events += group.events


def check(recipe: Recipe, model: nn.Module | State | None = None) -> list[Facts]:
    """The facts of each step: what it does, needs and gives up. A step that cannot run raises its own
    error."""
    given = model if model is None or isinstance(model, State) else start(model)
    stand = stand_in(recipe) if given is None else stand_in_for(given)
    makers, found, recorder = Makers(), [], Recorder()
    rounded = ""  # the step whose grids on edges are not stale
    executor = Executor(stand, recipe, observer=recorder, view=DryView, prove=False)
    for number, step in enumerate(recipe.steps):
        recorder.begin()
        try:
            executor.step(number, step)
        except RefusedError:
            if recorder.needs is None:  # the recipe is at fault, not the missing task
                raise
        events = list(recorder.events)
        edits = [event for event in events if isinstance(event, Edit)]
        facts: Facts = {
            "step": step.name,
            "what": (type(step).__doc__ or "").strip().splitlines()[0],
            "settings": unusual({"step": step.name, "settings": settings_of(step)}),
            "needs": EXAMPLE if recorder.needs == TASK and Needs.EXAMPLE in step.needs else recorder.needs,
            "notes": [
                *(e.text for e in events if isinstance(e, Note) and e.kind == "skipped" and not e.site),
                *recorder.left,
            ],
            "warnings": [
                {"text": why, "sites": sites if given else []} for why, sites in losses(edits, makers).items()
            ],
        }
        who = f"step {number + 1} {step.name}"
        if getattr(step, "activations", 0):
            rounded = "" if step.activation_range == "dynamic" else who  # dynamic ranges never become stale
        elif rounded and changes_ranges(step):
            text = f"makes the ranges of activations of {rounded} stale: put that step after it"
            facts["warnings"].append({"text": text, "sites": []})
            rounded = ""
        if given is not None:
            facts["sites"] = touched(step, events, stand.sites)
        found.append(facts)
        remember(edits, makers, who)
    return found


def touched(step: Any, events: Iterable[Event], sites: Mapping[str, Site]) -> list[str]:
    """The sites that a step works on: those in its events, or those that its `where` picks."""
    spoken = {event.site for event in events if isinstance(event, (Edit, Cut, Note)) and event.site}
    if not spoken:
        spoken = {site.name for site in select(sites, step.where, step.name)}
    return [name for name in sites if name in spoken]


def standing() -> set[str]:
    """The kinds of forms that refine keeps around new leaves."""
    return {name for name, form in FORMS.items() if form.inner}


def kinds(form: Node | None) -> set[str]:
    return set() if form is None else {node.name for _, node in form.walk()}


def losses(edits: Iterable[Edit], makers: Makers) -> dict[str, list[str]]:
    """What a step's edits give up: each reason, with its sites."""
    found: dict[str, list[str]] = {}
    for edit in edits:
        before, after = kinds(edit.before), kinds(edit.after)
        if edit.how == "absorb":
            inner = before - LEAVES
            gone = sorted(((inner - standing()) | (inner - after)) or inner)
            made = " and ".join(sorted({makers.get((edit.site, kind), "an earlier step") for kind in gone}))
            why = f"absorbs the result of {made} ({', '.join(gone)}): it is decoded and encoded again"
            found.setdefault(why, []).append(edit.site)
        if "coded" in before - after:
            coder = makers.get((edit.site, "coded"), "an earlier step")
            why = f"stores decoded what {coder} coded: put {coder.split()[-1]} after it"
            found.setdefault(why, []).append(edit.site)
    return found


def remember(edits: Iterable[Edit], makers: Makers, who: str) -> None:
    """Record which step made which kind of form."""
    for edit in edits:
        before, after = kinds(edit.before), kinds(edit.after)
        if edit.how == "absorb":
            before &= standing() | LEAVES
        for kind in after:
            if kind not in before or (edit.site, kind) not in makers:
                makers[edit.site, kind] = who
