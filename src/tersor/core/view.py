"""View: what a step may look at: forms, sites, statistics, the task, trials. Read-only.

A step sees the state as it was when the step began, never its own events: so a run that is resumed in the
middle of a step decides as it would have.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.core.state import State, known_base
from tersor.errors import RefusedError
from tersor.forms import Form
from tersor.model.answers import once
from tersor.model.fitted import fitted
from tersor.model.frozen import Frozen, frozen_in
from tersor.model.simulate import with_grids
from tersor.model.sites import Site, select
from tersor.model.stats import grams, has_gram
from tersor.model.task import Task
from tersor.model.trainable import TrainableForms
from tersor.model.trainable_parts import MakePart
from tersor.model.training_loop import TrainingPlan, fit
from tersor.record.events import Edit
from tersor.record.journal import Journal
from tersor.record.observer import Observer

GRAM_BYTES = 512 << 20  # of second moments held at once: layers beyond it take another pass over the data

Trial = Callable[["View", Iterable[Any]], tuple[dict[str, Any], State]]


@dataclass
class View:
    """The state before one step."""

    state: State
    maybe_task: Task | None
    step_name: str
    step: str  # where it stands among all steps, "3", and in a trial "3.1.0": what seeds are drawn from
    seed: int
    observer: Observer
    out: Path = Path()  # folder for files that steps write
    journal: Journal | None = None
    done: frozenset[str] = frozenset()  # keys of this step's groups that are in the journal already
    statistics: dict[str, Tensor] = field(default_factory=dict)  # of this state, shared with trials
    run_trial: Trial | None = None
    _trainings: int = 0
    _trials: int = 0
    place: str = ""  # of the last trial among those of this step

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.state.sites

    @property
    def forms(self) -> Mapping[str, Form]:
        return self.state.forms

    def weights(self, where: str | Iterable[str] = "*") -> list[Site]:
        """The sites that a glob means, in the model's order; SiteError with near misses for none."""
        return select(self.sites, where, self.step_name)

    def each(self, where: str | Iterable[str] = "*") -> Iterator[Site]:
        """The same, one by one, for steps whose sites do not depend on each other and whose groups have
        their names as keys: what a resumed run has already done is passed over, and progress is told."""
        sites = self.weights(where)
        for number, site in enumerate(sites, 1):
            if site.name not in self.done:
                yield site
            self.observer.progress(number, len(sites), site.name)

    def form(self, site: Site | str) -> Form:
        """How the site is stored."""
        return self.forms[site if isinstance(site, str) else site.name]

    def shape(self, site: Site | str) -> tuple[int, ...]:
        """The shape now; Site.shape is the one that was given."""
        return tuple(self.form(site).shape)

    def present(self, site: Site | str, axis: int) -> tuple[int, ...]:
        """The given index of each index that is present along an axis: what cuts name."""
        return self.state.present(site if isinstance(site, str) else site.name, axis)

    @property
    def task(self) -> Task:
        """What the model is for; RefusedError where the run has none."""
        if self.maybe_task is None:
            raise RefusedError(
                f"{self.step_name}: needs a task (batches, loss, metric). Give --task, or run(task=...)"
            )
        return self.maybe_task

    def model(self, forms: Mapping[str, Form] | None = None) -> nn.Module:
        """The model as it stands, with `forms` put in by site where given, and the grids on its edges."""
        return with_grids(self.plain(forms), self.state.grids)

    def plain(self, forms: Mapping[str, Form] | None = None) -> nn.Module:
        """The same without grids: its modules have the names that sites have."""
        state = self.state
        return fitted(
            self._module(), {**state.forms, **(forms or {})}, state.sites, state.aliases, state.changes
        )

    def base(self) -> nn.Module:
        """A copy of the model as it was first given: the teacher unless another is named. RefusedError where
        only a file of what became of it is there."""
        base = known_base(self.state, self.step_name)
        return fitted(self._module(), base.forms, base.sites, base.aliases)

    def _module(self) -> nn.Module:
        if self.state.given is None:
            raise RefusedError(f"{self.step_name}: needs the model itself, and there are only its weights")
        return self.state.given

    def seed_for(self, site: Site | str = "") -> int:
        """The same on every machine: hash() is salted anew in each process."""
        name = site if isinstance(site, str) else site.name
        return zlib.crc32(f"{self.seed}/{self.step}/{name}".encode())

    def gram(self, site: Site) -> Tensor | None:
        """Second moment of the inputs of a site's layer, [I, I]; None where its inputs cannot be seen."""
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
        return self.statistics.get(site.name)

    def train(
        self, plan: TrainingPlan, *, forms: Mapping[str, Form] | None = None,
        begin: Mapping[str, Form] | None = None, where: Iterable[Site] | None = None,
        teacher: nn.Module | None = None,
        on_step: Callable[[TrainableForms, int, int], None] | None = None, text: str = "training",
        makers: Mapping[str, MakePart] | None = None, key: str = "",
    ) -> tuple[dict[str, Form], dict[str, float]]:  # fmt: skip
        """Train the model as it stands (with `forms` put in); returns the sites whose form moved, and what
        fit says.

        `begin`: finer forms of some sites, whose weights the rounded ones learn on from. `where`: the sites
        that learn (default: all parameters). The teacher is the base model unless given. `makers`: how even
        grids of some sites learn, where not as usual. `key`: for steps that yield between trainings: a
        resumed run, which passes over what is done, knows a training by it (others by their number).
        """
        after = {**self.forms, **(forms or {})}
        # Of cut and replaced modules a fitted one has the shapes; it need not have the new values.
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
            watch=lambda done, total, said: self.observer.progress(done, total, f"{text}, {said}"),
        )  # fmt: skip
        moved = {name: form for name, form in tuned.fold().items() if form.digest != self.forms[name].digest}
        return moved, facts

    def trial(self, steps: Iterable[Any], key: str = "") -> tuple[dict[str, Any], State]:
        """Run steps on the side, from the state as it is seen here: (facts, what became of it). Facts are the
        data of the notes about the whole model, by kind, and "nbytes". It has a journal of its own where the
        run has one, and shares this state's statistics. Nothing of it counts until the step yields it. `key`:
        as in train."""
        if self.run_trial is None:
            raise RefusedError(f"{self.step_name}: trials are not run here")
        self._trials += 1
        self.place = f"{zlib.crc32(key.encode()):08x}" if key else f"{self._trials}"
        return self.run_trial(self, steps)

    def edits(self, after: Mapping[str, Form], how: str = "refine") -> tuple[Edit, ...]:
        """Edits of many sites at once, in the model's order."""
        return tuple(Edit(name, self.forms[name], after[name], how) for name in self.sites if name in after)
