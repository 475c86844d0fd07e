"""Run: the executor, which applies the groups of events that steps yield, and keeps the ledger.

    state -> step, step, step -> state, with the ledger of all events since the model was first given
Runs, packs, dry checks and trials all use the executor, and nothing else writes to a state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any

from torch import nn

from tersor.compiled import begin
from tersor.core.apply import apply
from tersor.core.history import compare_lock
from tersor.core.proof import proved
from tersor.core.recipe import Recipe, as_recipe
from tersor.core.state import State, start
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError
from tersor.model.code import fingerprints
from tersor.model.given_masks import HELD, NONE, with_masks
from tersor.model.grid_order import refuse_order
from tersor.model.part import check_parts, naming_parts
from tersor.model.stats import Gram
from tersor.model.task import Task
from tersor.record.events import Edit, Event, Group, Note
from tersor.record.journal import Journal
from tersor.record.observer import Observer, keeping
from tersor.record.skipped import LEFT, skipped_sites
from tersor.threads import first


def run(
    model: nn.Module | State, recipe: Recipe | Iterable[Any] | Any, task: Task | None = None, *,
    seed: int = 0, journal: str | Path | None = None, resume: bool = False,
    observer: Observer | None = None, out: str | Path = ".",
) -> State:  # fmt: skip
    """Compress a model by a recipe: a Recipe, a step, or a list of steps; tersor.run also takes the path of a
    recipe file.

    The given model is not changed. A state (from another run or a file) is continued: its ledger goes on, and
    results are compared with the model as it was first given. `task` gives batches, scores and a loss; steps
    that need none run without it. With `journal` (a folder) every applied group is kept on disk, and `resume`
    continues after the last one. Files that steps write (exports) go to `out`.
    """
    recipe, observer = as_recipe(recipe, seed), observer or Observer()
    refuse_order(recipe.steps)
    state = model if isinstance(model, State) else start(model, task)
    if recipe.base is not None and recipe.base != state.digest:
        raise RefusedError(f"recipe: the lock is for base {recipe.base}, this model is {state.digest}")
    if task is not None and state.given is not None:
        task.check(whole := state.plain(), reduce(or_, (step.needs for step in recipe.steps)))
        check_parts(whole, task)
    begin(name for step in recipe.steps for name in getattr(step, "loops", ()))
    with ExitStack() as stack:
        kept = None
        if journal is not None:
            prints, unseen = fingerprints(state.given, task, recipe.steps)
            prints |= {"model": state.trail, "recipe": recipe.digest}
            if unseen:
                observer.message(f"journal: a change of this code would not be noticed: {', '.join(unseen)}")
            kept = stack.enter_context(Journal(journal, prints, resume=resume, writes=first()))
        result = Executor(state, recipe, task, observer=observer, out=Path(out), journal=kept).run()
    compare_lock(recipe, result)
    return result


REFUSED = ("refused", "void")  # notes on a group whose proof failed
AGAIN, CAME = "coded again", "zeros that came"  # keys of the executor's own groups; journals hold them


class Executor:
    """The only writer: takes a state through the steps of a recipe."""

    def __init__(
        self, state: State, recipe: Recipe, task: Task | None = None, *,
        observer: Observer | None = None, out: Path = Path(), journal: Journal | None = None,
        view: type[View] = View, prove: bool = True, done: frozenset[str] = frozenset(),
        path: str = "", statistics: dict[str, Gram] | None = None,
    ):  # fmt: skip
        """`view`: the class of views that steps get. `prove`: prove cuts on the task's batches; a dry check
        has none. `done`: keys of groups to skip. `path`: place of the step whose trial this is. `statistics`:
        those of this state that are known already."""
        self.recipe, self.task, self.observer, self.out = recipe, task, observer or Observer(), out
        self.journal, self.view_type, self.prove, self.done, self.path = journal, view, prove, done, path
        self.first = state.ledger.count
        self.state = replace(state, ledger=state.ledger.follow(recipe.to_json()))
        self.statistics = (state.digest if statistics is not None else "", statistics or {})

    def run(self) -> State:
        for number, step in enumerate(self.recipe.steps):
            self.observer.step(number + 1, len(self.recipe.steps), step.name)
            self.step(number, step)
        return self.state

    def step(self, number: int, step: Any) -> None:
        """One step: first its groups in the journal, then the rest."""
        began, begin, at = time.perf_counter(), self.state, self.first + number
        self.state = replace(begin, ledger=begin.ledger.until(begin.ledger.count))  # the view keeps its own
        lines = [] if self.journal is None else [line for line in self.journal.lines if line.step == number]
        for line in lines:
            self.record(at, step.name, line.group())
        if lines and lines[-1].seconds is not None:
            self.end(at, step.name, lines[-1].seconds)
            return
        done = self.done | {line.key for line in lines}
        if (masks := self.zeros(number, step, begin)) is not None:
            begin = apply(begin, masks, step.name)[0]  # the step sees the masks
            if CAME not in done:
                self.put(number, step.name, masks)
        seen: set[str] = set()
        # The view is not kept: it refers to the executor, for trials, and a cycle keeps past forms in memory.
        view = self.view_of(number, step, begin, done)
        for line in lines:  # a group that was taken back holds nothing but the note on it
            for note in line.group().events:
                if isinstance(note, Note) and note.kind in REFUSED:
                    view.refused[line.key] = note.text
        with naming_parts(begin.plain, self.task), keeping(begin, self.recipe.steps[number:]):
            for group in step.run(view):
                if group.key in seen or group.key in ("", AGAIN, CAME, LEFT):
                    raise RefusedError(
                        f"{step.name}: the key {group.key!r} is taken; a resume needs unique keys"
                    )
                seen.add(group.key)
                if group.key not in done and (why := self.put(number, step.name, group)):
                    view.refused[group.key] = why
        del view
        sites, ledger = self.state.sites, self.state.ledger
        for own in (skipped_sites(step, sites, ledger, at, self.done), self.coded_again(begin)):
            if own is not None and own.key not in done:
                self.put(number, step.name, own)
        seconds = time.perf_counter() - began
        if self.journal is not None:
            self.journal.append(number, Group("", ()), seconds=seconds)
        self.end(at, step.name, seconds)

    def put(self, number: int, name: str, group: Group) -> str:
        """Apply a new group. If its proof fails, record only a note with the reason, which is returned."""
        why = ""
        if group.proof and self.prove:
            apply(self.state, group, name)  # an invalid group is an error, not a failed proof
            accepted, note = proved(self.state, group, self.task, name)
            group = replace(group, events=(*group.events, note)) if accepted else Group(group.key, (note,))
            why = "" if accepted else note.text
        self.record(self.first + number, name, group)
        if self.journal is not None:
            self.journal.append(number, group)
        self.observer.applied(group)
        return why

    def record(self, at: int, name: str, group: Group) -> None:
        after, digests = apply(self.state, group, name)
        after.ledger.record(at, name, group, digests)
        self.state = after

    def end(self, at: int, name: str, seconds: float) -> None:
        self.state.ledger.seconds[at] = seconds
        self.observer.ended(name, seconds)

    def zeros(self, number: int, step: Any, begin: State) -> Group | None:
        """Masks for zeros in the given weights: of all sites, or only the step's if it works site by site."""
        where = step.where if step.needs is Needs.NOTHING else "*"
        zeros = NONE if getattr(step, "lossless", False) else self.recipe.zeros_of(number)
        events: list[Event] = []
        for name, after in with_masks(begin.sites, begin.forms, zeros, where, step.name).items():
            events += [Edit(name, begin.forms[name], after, "wrap"), Note(name, "masked", HELD)]
        return Group(CAME, tuple(events)) if events else None

    def coded_again(self, begin: State) -> Group | None:
        """Edits that code leaves again with their earlier profile: a cut decodes coded leaves."""
        edits = [
            Edit(name, now, after, "lossless")
            for name, kept in self.state.kept.items() if kept != begin.kept.get(name) and name in begin.forms
            if (after := coded_like(now := self.state.forms[name], begin.forms[name])) is not now
        ]  # fmt: skip
        return Group(AGAIN, tuple(edits)) if edits else None

    def view_of(self, number: int, step: Any, begin: State, done: frozenset[str]) -> View:
        known, found = self.statistics
        if known != begin.digest:
            self.statistics = known, found = begin.digest, {}
        # Later steps of the recipe are left out: a trial must not depend on them.
        at = self.first + number
        begin = replace(begin, ledger=begin.ledger.until(at))
        place = f"{self.path}{number}" if self.path else f"{at}"
        return self.view_type(
            begin, self.task, step.name, place, self.recipe.seed_of(number), self.observer, self.out,
            self.journal, done, found, partial(self.trial, self.recipe.zeros_of(number)),
        )  # fmt: skip

    def trial(self, zeros: str, view: View, steps: Iterable[Any]) -> tuple[dict[str, Any], State]:
        """Run steps as a trial, with the `zeros` of the step that asks for it; see View.trial."""
        recipe, path = as_recipe(steps, view.seed, zeros), f"{view.step}.{view.place}"
        with ExitStack() as stack:
            kept = None
            if self.journal is not None:
                prints = {"model": view.state.trail, "recipe": recipe.digest, "run": self.journal.root}
                folder = self.journal.folder / f"trial-{path}"
                kept = stack.enter_context(Journal(folder, prints, resume=True, writes=self.journal.writes))
            executor = Executor(
                view.state, recipe, view.maybe_task, out=self.out, journal=kept, view=self.view_type,
                prove=self.prove, path=f"{path}.", statistics=view.statistics,
            )  # fmt: skip
            result = executor.run()
        notes = [e for e in result.ledger.notes(first=view.state.ledger.count) if not e.site]
        return {**{e.kind: dict(e.data) for e in notes}, "nbytes": result.nbytes}, result
