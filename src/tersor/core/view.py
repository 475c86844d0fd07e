"""View: the read-only interface of a step to the state: forms, sites, statistics, the task, trials.

A step sees the state as it was when the step began, never its own events. A run that is resumed in the middle
of a step therefore takes the same decisions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from tersor.core.apply import apply
from tersor.core.state import State, known_base
from tersor.errors import RefusedError
from tersor.forms import Form
from tersor.model.changes import Set
from tersor.model.deployed import deployed
from tersor.model.frozen import Frozen, frozen_in
from tersor.model.module_writer import write_module
from tersor.model.output_comparison import once
from tersor.model.part import part_of
from tersor.model.simulate import with_grids
from tersor.model.sites import Site, select
from tersor.model.stats import Gram, grams, has_gram
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms
from tersor.model.trainable_parts import MakePart
from tersor.model.training_loop import TrainingPlan, fit
from tersor.record.events import Edit, Group
from tersor.record.journal import Journal
from tersor.record.observer import Observer

GRAM_BYTES = 512 << 20  # of second moments held at once; more layers need another pass over the data

Trial = Callable[["View", Iterable[Any]], tuple[dict[str, Any], State]]


@dataclass
class View:
    """The state before one step."""

    state: State
    maybe_task: Task | None
    step_name: str
    step: str  # its place among all steps, "3", and in a trial "3.1.0"; seeds depend on it
    seed: int
    observer: Observer
    out: Path = Path()  # folder for files that steps write
    journal: Journal | None = None
    done: frozenset[str] = frozenset()  # keys of this step's groups that are in the journal already
    statistics: dict[str, Gram] = field(default_factory=dict)  # of this state, shared with trials
    run_trial: Trial | None = None
    refused: dict[str, str] = field(default_factory=dict)  # groups of this step that were taken back: why
    _trainings: int = 0
    _trials: int = 0
    place: str = ""  # the last trial's place among the trials of this step

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.state.sites

    @property
    def forms(self) -> Mapping[str, Form]:
        return self.state.forms

    def weights(self, where: str | Iterable[str] = "*") -> list[Site]:
        """The sites that a glob matches, in the model's order. SiteError with near misses if none match."""
        return select(self.sites, where, self.step_name)

    def each(self, where: str | Iterable[str] = "*") -> Iterator[Site]:
        """The same, one by one, for steps that work site by site with the sites' names as keys of groups.
        Skips the sites that a resumed run has already done, and reports progress."""
        sites = self.weights(where)
        for number, site in enumerate(sites, 1):
            if site.name not in self.done:
                yield site
            self.observer.progress(number, len(sites), site.name)

    def form(self, site: Site | str) -> Form:
        """The current form of the site."""
        return self.forms[site if isinstance(site, str) else site.name]

    def shape(self, site: Site | str) -> tuple[int, ...]:
        """The current shape; Site.shape is the given one."""
        return tuple(self.form(site).shape)

    def groups(self, site: Site) -> int:
        """The groups of the site's convolution now; Site.groups are the given ones."""
        changes = (c for c in reversed(self.state.changes) if isinstance(c, Set))
        set_to = (c.value for c in changes if (c.module, c.attribute) == (site.layer, "groups"))
        return next(set_to, site.groups)

    def present(self, site: Site | str, axis: int) -> tuple[int, ...]:
        """The given index of each index that is present along an axis. Cuts name given indices."""
        return self.state.present(site if isinstance(site, str) else site.name, axis)

    @property
    def task(self) -> Task:
        """The run's task. RefusedError if the run has none."""
        if self.maybe_task is None:
            raise RefusedError(
                f"{self.step_name}: needs a task (batches, loss, metric). Give --task, or run(task=...)"
            )
        return self.maybe_task

    @cached_property
    def part(self) -> Self:
        """The view of the part that the task names: its model runs that alone, and its task's batches are the
        part's inputs. This view if there is none. For what traces and exports; training is of the whole."""
        if self.state.given is None or self.maybe_task is None or not self.maybe_task.parts:
            return self
        given, task = part_of(self.state.given, self.maybe_task, self.plain)
        grids = {edge: grid for edge, grid in self.state.grids.items() if self.inside(edge)}
        return replace(self, state=replace(self.state, given=given, grids=grids), maybe_task=task)

    def inside(self, name: str) -> bool:
        """Whether a module, weight or edge is inside of the part; yes if there is none, or no task."""
        return self.maybe_task is None or self.maybe_task.in_part(name)

    def model(self, forms: Mapping[str, Form] | None = None) -> nn.Module:
        """The current model with the grids on its edges. `forms` replaces the forms of some sites."""
        return with_grids(self.plain(forms), self.state.grids)

    def plain(self, forms: Mapping[str, Form] | None = None) -> nn.Module:
        """The same without grids. Its modules have the names that the sites have."""
        state = self.state
        return write_module(
            self._module(), {**state.forms, **(forms or {})}, state.sites, state.aliases, state.changes
        )

    def deployed(self, weights: str = "packed") -> nn.Module:
        """The current model as a runtime gets it: with grids, and weights as codes. See model/deployed.py."""
        forms = {n: form for n, form in self.forms.items() if self.sites[n].is_weight and self.inside(n)}
        return deployed(self.plain(), self.state.grids, forms, weights)

    def base(self) -> nn.Module:
        """A copy of the model as it was first given: the default teacher. RefusedError for a file without the
        first weights."""
        base = known_base(self.state, self.step_name)
        return write_module(self._module(), base.forms, base.sites, base.aliases)

    def _module(self) -> nn.Module:
        if self.state.given is None:
            raise RefusedError(f"{self.step_name}: needs the model, and there are only its weights")
        return self.state.given

    def after(self, group: Group) -> Self:
        """The view as it will be after this group, for a step whose next groups build on it. The group itself
        has to be yielded, and may be refused: then its key is in `refused`."""
        return replace(self, state=apply(self.state, group, self.step_name)[0], statistics={})

    def seed_for(self, site: Site | str = "") -> int:
        """A seed that is the same on every machine. hash() has another salt in each process."""
        name = site if isinstance(site, str) else site.name
        return zlib.crc32(f"{self.seed}/{self.step}/{name}".encode())

    def gram(self, site: Site) -> Tensor | None:
        """Second moment of the inputs of a site's layer, [I, I]. None if they cannot be observed."""
        if not has_gram(site):
            return None
        if site.name not in self.statistics:
            chunk, room = [], GRAM_BYTES
            names = list(self.sites)
            for name in names[names.index(site.name) :]:
                other, shape = self.sites[name], self.shape(name) or (1,)
                size = 4 * (math.prod(shape) // max(shape[other.axis], 1)) ** 2
                if has_gram(other) and len(other.shape) >= 2 and (size <= room or other is site):
                    chunk.append(other)
                    room -= size
            self.statistics.clear()
            self.statistics.update(grams(self.plain(), self.task, chunk))
        found = self.statistics.get(site.name)
        return None if found is None else found.moment

    def samples(self, site: Site) -> int:
        """How many inputs `gram(site)`, which was asked for before, is the mean of."""
        return self.statistics[site.name].samples

    def train(
        self, plan: TrainingPlan, *, forms: Mapping[str, Form] | None = None,
        begin: Mapping[str, Form] | None = None, where: Iterable[Site] | None = None,
        teacher: nn.Module | None = None,
        on_step: Callable[[TrainableForms, int, int], None] | None = None, text: str = "training",
        makers: Mapping[str, MakePart] | None = None, key: str = "",
    ) -> tuple[dict[str, Form], dict[str, float]]:  # fmt: skip
        """Train the current model, with `forms` in place of the forms of some sites. Returns (the forms that
        changed, the facts of the training).

        `begin`: more exact forms of some sites, whose weights the rounded ones start from. `where`: the sites
        that learn (default: all parameters). `teacher`: default the base model. `makers`: trainable parts of
        some sites, if not the usual ones. `key`: identifies the training in a resumed run, for steps that
        yield between trainings (default: its number).
        """
        after = {**self.forms, **(forms or {})}
        # A fitted module has the shapes of cut and replaced modules; its values may be old.
        module = self.plain() if self.state.kept or self.state.changes else self._module()
        frozen = frozen_in(module, self.sites) if plan.frozen == "stay" else Frozen()
        learn = frozen.learning(self.sites.values() if where is None else where, self.step_name)
        tuned = TrainableForms(
            module, after, self.sites, learn, makers, still=[n for n in frozen.tensors if n in (forms or {})],
            resting=frozen.modules, edge_grids=self.state.grids,
            example=lambda net: once(self.task, net, "train"),
        )  # fmt: skip
        for scale in tuned.grids.parameters():
            scale.requires_grad_(False)
        tuned.begin(begin or {})
        if teacher is None and (plan.teacher_weight > 0 or plan.features):
            teacher = self.base()
        self._trainings += 1
        part = f"{zlib.crc32(key.encode()):08x}" if key else f"{self._trainings}"
        facts = fit(
            tuned, self.task, plan, seed=self.seed_for(f"training {part}"), teacher=teacher,
            on_step=None if on_step is None else (lambda step, total: on_step(tuned, step, total)),
            checkpoint=None if self.journal is None else self.journal.training(self.step, part),
            watch=lambda done, total, state: self.observer.progress(done, total, f"{text}, {state}"),
        )  # fmt: skip
        moved = {name: form for name, form in tuned.fold().items() if form.digest != self.forms[name].digest}
        return moved, facts

    def trial(self, steps: Iterable[Any], key: str = "") -> tuple[dict[str, Any], State]:
        """Run steps as a trial, with this view's state and task: (facts, the new state). Facts are the data
        of the notes about the whole model, by kind, and "nbytes". If the run has a journal, the trial has one
        too. It shares this state's statistics, and has no effect on the run until the step yields its
        results. `key`: as in train."""
        if self.run_trial is None:
            raise RefusedError(f"{self.step_name}: no trials can be run here")
        self._trials += 1
        self.place = f"{zlib.crc32(key.encode()):08x}" if key else f"{self._trials}"
        return self.run_trial(self, steps)

    def edits(self, after: Mapping[str, Form], how: str = "refine") -> tuple[Edit, ...]:
        """Edits of many sites at once, in the model's order."""
        return tuple(Edit(name, self.forms[name], after[name], how) for name in self.sites if name in after)
