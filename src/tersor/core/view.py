"""View: what a step may look at: forms, sites, statistics, the task, trial models. Read-only.

A step sees the state as it was when the step began, never its own edits: so a run that is resumed in the
middle of a step decides as it would have.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from tersor.core.journal import Journal
from tersor.core.step import Edit
from tersor.errors import RefusedError, SettingError
from tersor.forms import Form
from tersor.model.dress import dress
from tersor.model.fit import Plan, fit
from tersor.model.sites import Site, select
from tersor.model.stats import grams, has_gram
from tersor.model.task import Task
from tersor.model.tune import Grid, Tuned

GRAM_BYTES = 512 << 20  # of second moments held at once: layers beyond it take another pass over the data


class Watch:
    """Who is told of progress; this one keeps silent. Reports and the command line bring their own."""

    def step(self, number: int, total: int, name: str) -> None:
        """A step begins."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Something long has come this far."""


@dataclass
class View:
    """The state before one step."""

    sites: Mapping[str, Site]
    forms: Mapping[str, Form]
    aliases: Mapping[str, str]
    base_model: nn.Module | None
    base_forms: Mapping[str, Form]
    maybe_task: Task | None
    step_name: str
    step: int
    seed: int
    watch: Watch
    out: Path = Path()  # folder for files that steps write
    journal: Journal | None = None
    done: frozenset[str] = frozenset()  # sites whose events of this step are already in the journal
    _grams: dict[str, Tensor] = field(default_factory=dict)
    _trainings: int = 0

    def weights(self, where: str | Iterable[str] = "*") -> list[Site]:
        """The sites that a glob means, in the model's order; SiteError with near misses for none."""
        return select(self.sites, where, self.step_name)

    def each(self, where: str | Iterable[str] = "*") -> Iterator[Site]:
        """The same, one by one, for steps whose sites do not depend on each other: what a resumed run has
        already done is passed over, and progress is told."""
        sites = self.weights(where)
        for number, site in enumerate(sites, 1):
            if site.name not in self.done:
                yield site
            self.watch.progress(number, len(sites), site.name)

    def form(self, site: Site | str) -> Form:
        """How the site is stored."""
        return self.forms[site if isinstance(site, str) else site.name]

    @property
    def task(self) -> Task:
        """What the model is for; RefusedError where the run has none."""
        if self.maybe_task is None:
            raise RefusedError(
                f"{self.step_name}: needs a task (batches, loss, metric). Give --task, or run(task=...)"
            )
        return self.maybe_task

    def model(self, forms: Mapping[str, Form] | None = None) -> nn.Module:
        """A plain copy of the model as it stands, with `forms` put in by site where given."""
        return dress(self._module(), {**self.forms, **(forms or {})}, self.sites, self.aliases)

    def base(self) -> nn.Module:
        """A copy of the model as it was given: the teacher unless another is named."""
        return dress(self._module(), self.base_forms, self.sites, self.aliases)

    def _module(self) -> nn.Module:
        if self.base_model is None:
            raise RefusedError(f"{self.step_name}: needs the model itself, and there are only its weights")
        return self.base_model

    def seed_for(self, site: Site | str = "") -> int:
        """The same on every machine: hash() is salted anew in each process."""
        name = site if isinstance(site, str) else site.name
        return zlib.crc32(f"{self.seed}/{self.step}/{name}".encode())

    def gram(self, site: Site) -> Tensor | None:
        """Second moment of the inputs of a site's layer, [I, I]; None where its inputs cannot be seen."""
        if not has_gram(site):
            return None
        if site.name not in self._grams:
            chunk, room = [], GRAM_BYTES
            names = list(self.sites)
            for name in names[names.index(site.name) :]:
                other = self.sites[name]
                size = 4 * math.prod(other.shape[1:]) ** 2
                if has_gram(other) and len(other.shape) >= 2 and (size <= room or other is site):
                    chunk.append(other)
                    room -= size
            self._grams = grams(self.model(), self.task, chunk)
        return self._grams.get(site.name)

    def train(
        self, plan: Plan, *, forms: Mapping[str, Form] | None = None, begin: Mapping[str, Form] | None = None,
        where: Iterable[Site] | None = None, teacher: nn.Module | None = None,
        on_step: Callable[[Tuned, int, int], None] | None = None, text: str = "training",
        grids: Mapping[str, Grid] | None = None,
    ) -> tuple[dict[str, Form], dict[str, float]]:  # fmt: skip
        """Train the model as it stands (with `forms` put in); returns the sites whose form moved, and what
        fit says.

        `begin`: finer forms of some sites, whose weights the rounded ones learn on from. `where`: the sites
        that learn (default: all parameters). The teacher is the base model unless given. `grids`: how even
        grids of some sites learn, where not as usual.
        """
        state = {**self.forms, **(forms or {})}
        learn = [s.name for s in (self.sites.values() if where is None else where) if s.is_parameter]
        if not learn:
            raise SettingError(f"{self.step_name}: no parameter is left to train")
        tuned = Tuned(self._module(), state, self.sites, learn, grids)
        tuned.begin(begin or {})
        if teacher is None and (plan.share > 0 or plan.features):
            teacher = self.base()
        self._trainings += 1
        facts = fit(
            tuned, self.task, plan, seed=self.seed_for(f"training {self._trainings}"), teacher=teacher,
            on_step=None if on_step is None else (lambda step, total: on_step(tuned, step, total)),
            checkpoint=None if self.journal is None else self.journal.training(self.step, self._trainings),
            watch=lambda done, total, said: self.watch.progress(done, total, f"{text}, {said}"),
        )  # fmt: skip
        moved = {name: form for name, form in tuned.fold().items() if form.digest != self.forms[name].digest}
        return moved, facts

    def edits(self, after: Mapping[str, Form], how: str = "refine") -> tuple[Edit, ...]:
        """Edits of many sites at once, in the model's order."""
        return tuple(Edit(name, self.forms[name], after[name], how) for name in self.sites if name in after)
