"""Trials: recipes that are run on the side and judged, each in a folder, so that a killed search goes on.

DIR/trials/NAME/journal/     as of any run; the trial is replayed from it
DIR/trials/NAME/trial.json   what was measured
judged by    drop      on samples that do not judge the final result, with its 95 % interval
             size      the trial's own .tersor file
             latency   in the runtime, in turn with the given model
Cost: that of the recipe, one pass over the samples that decide, and for latency one export and some seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tersor.candidates.candidate import Candidate
from tersor.candidates.timed import timed
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.dtypes import in_bytes
from tersor.errors import InternalError, JournalError, TersorError, UserCodeError
from tersor.files import LOCKED, write_text
from tersor.io.container_writer import save
from tersor.model.task import Task
from tersor.pipeline import JOURNAL, plain_nbytes
from tersor.record.observer import Observer
from tersor.report.console import percent, whole
from tersor.search.budget import Budget
from tersor.steps.drop_search import Deciding

FOLDER, FACTS = "trials", "trial.json"
SHORT = 1.25  # times the size that was asked for: trainings that are long enough end within some percent
Facts = dict[str, Any]


class Named(Observer):
    """Passes on what a trial does, with its name."""

    def __init__(self, to: Observer, name: str):
        self.to, self.name = to, name

    def step(self, number: int, total: int, name: str) -> None:
        self.to.step(number, total, f"{self.name}: {name}")

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.to.progress(done, total, text)


class Workers(Protocol):
    """Where trials run ahead of the search: search/ahead.py."""

    def ask(self, chains: list[list[Trial]]) -> None:
        """Have these run, as many as there is room for, and no others."""

    def take(self, trial: Trial) -> None:
        """Bring the journal of a trial that was asked for to its folder, when it is done."""

    def settle(self) -> None:
        """Wait until nothing runs."""


class OutOfTime(Exception):
    """No more trials are begun."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A recipe, after that of another trial, and what became of it."""

    name: str
    steps: tuple[Any, ...]
    after: Trial | None = None
    why: str = ""  # it was refused
    nothing: bool = False  # it changed no weight
    drop: tuple[float, float, float] = (math.nan, math.nan, math.nan)  # with its 95 % interval
    nbytes: int = 0  # of its .tersor file
    latency: Facts | None = None  # as of candidates/timed.py
    reached: float | None = None  # bits for each weight that a training under a price came to
    seconds: float = 0.0

    @property
    def recipe(self) -> tuple[Any, ...]:
        """All steps, from the given model on."""
        return tuple(step for trial in self.chain for step in trial.steps)

    @property
    def chain(self) -> list[Trial]:
        """The trials that it comes after, and itself."""
        return [*(self.after.chain if self.after else ()), self]

    @property
    def short(self) -> bool:
        """Whether its training was too short for the size that it was to reach."""
        return self.reached is not None and self.reached > SHORT * self.steps[0].bits


@dataclass
class Trials:
    """Runs and judges trials, once each."""

    given: State
    task: Task  # for the steps: its training and calibration batches decide nothing
    decide: Deciding
    budget: Budget
    out: Path
    runtime: str  # that trials are timed in; "" if they are not
    batch: int = 1
    threads: int = 1
    seed: int = 0
    tiny: bool = False
    until: float = math.inf  # of time.monotonic(): no trial begins later
    observer: Observer = field(default_factory=Observer)
    found: dict[str, Trial] = field(default_factory=dict)
    shapes: dict[str, Trial] = field(default_factory=dict)  # trials that others come after
    states: dict[str, State] = field(default_factory=dict)  # of these
    workers: Workers | None = None  # where trials run ahead

    def __post_init__(self) -> None:
        self.given_nbytes = plain_nbytes(self.given)
        self.decided_by = f"{self.decide.name}, {digest_of(self.decide)}"

    def shape(self, trial: Trial) -> Trial:
        """A trial that others come after, run and not judged. If it changes nothing, none does."""
        if trial.name not in self.shapes:
            after = None if trial.after is None else self.shape(trial.after)
            if after is not None and after.nothing:
                return after
            made = self._made(replace(trial, after=after), keep=True)
            if after is None and not made.why and unchanged(self.given, self.states[made.name]):
                self.observer.message(f"{made.name}: there is nothing to remove")
                made = replace(made, nothing=True)
            self.shapes[trial.name] = made
        return self.shapes[trial.name]

    def weights_of(self, shape: Trial) -> str:
        """A digest of the weights of a trial that others come after; "" if it was refused."""
        state = self.states.get(shape.name)
        forms = () if state is None else sorted((name, form.digest) for name, form in state.forms.items())
        return hashlib.sha256(repr(forms).encode()).hexdigest() if forms else ""

    def judged(self, trial: Trial) -> Trial:
        """A trial with what was measured of it."""
        if trial.name not in self.found:
            self.found[trial.name] = self._made(trial, keep=False)
            self.observer.message(f"{trial.name}: {self.in_words(self.found[trial.name])}")
        return self.found[trial.name]

    def run_ahead(self, trials: Sequence[Trial]) -> None:
        """Have trials run elsewhere that may be asked for next, the next one first."""
        if self.workers is not None and time.monotonic() <= self.until:
            self.workers.ask([trial.chain for trial in trials if trial.name not in self.found])

    def state(self, trial: Trial) -> State:
        """The compressed model of a trial, from its journal if it has run."""
        if trial.name in self.states:
            return self.states[trial.name]
        begin = self.given if trial.after is None else self.state(trial.after)
        journal = self.folder(trial) / JOURNAL
        if self.workers is not None:
            self.workers.take(trial)
        return run(
            begin, list(trial.steps), self.task, seed=self.seed, journal=journal, resume=journal.exists(),
            observer=Named(self.observer, trial.name), out=self.folder(trial),
        )  # fmt: skip

    def folder(self, trial: Trial) -> Path:
        """A folder for its whole recipe: a resumed search may train longer, and that is another trial."""
        words = re.sub(r"[^a-z0-9.]+", "-", trial.name.lower())
        return self.out / FOLDER / f"{words}-{Recipe(trial.recipe, self.seed).digest[:8]}"

    def _made(self, trial: Trial, *, keep: bool) -> Trial:
        """The trial, run and unless `keep` judged. Refusals are facts; faults and wrong files are raised."""
        if trial.after is not None and trial.after.why:
            return replace(trial, why=trial.after.why)
        if time.monotonic() > self.until:
            raise OutOfTime
        began = time.monotonic()
        try:
            state = self.state(trial)
            facts = {} if keep else {**self.measured(trial, state), "reached": reached(trial, state)}
        except (InternalError, JournalError, UserCodeError):
            raise
        except TersorError as error:
            return replace(trial, why=str(error), seconds=time.monotonic() - began)
        if keep:
            self.states[trial.name] = state
        return replace(trial, **{"seconds": time.monotonic() - began, **facts})

    def measured(self, trial: Trial, state: State) -> Facts:
        """What was measured of a trial before, or now."""
        path = self.folder(trial) / FACTS
        same = {
            "result": state.digest, "decided by": self.decided_by, "runtime": self.runtime,
            "batch": self.batch, "threads": self.threads, "tiny": self.tiny,
        }  # fmt: skip
        if (kept := read_facts(path, same)) is not None:
            return kept
        began = time.monotonic()
        drop = self.decide.drop(state.model())
        facts: Facts = {
            "drop": (drop.amount, drop.low, drop.high),
            "nbytes": save(state, self.folder(trial) / "model.tersor", tiny=self.tiny),
            "latency": self.timed(trial.name, state) if self.runtime else None,
        }
        facts["seconds"] = sum(state.ledger.seconds.values()) + time.monotonic() - began
        write_text(path, json.dumps({"of": same, "facts": facts, "sha256": digest(facts)}, indent=1) + "\n")
        return facts

    def timed(self, name: str, state: State) -> Facts:
        """The times of the given model and of a state, in turn, while no other trial runs."""
        if self.workers is not None:
            self.workers.settle()
        before = Candidate("given", "model", 0, self.given.model(), self.given)
        after = Candidate(name, "model", 0, state.model(), state)
        return timed(
            before, after, self.task, runtime=self.runtime, batch=self.batch, threads=self.threads,
            observer=self.observer,
        )  # fmt: skip

    def timed_again(self, trial: Trial) -> Trial:
        """The trial with new times, if it was timed."""
        if trial.latency is None:
            return trial
        return replace(trial, latency=self.timed(trial.name, self.state(trial)))

    # What a trial means for the budget

    def used(self, trial: Trial) -> dict[str, float]:
        """How much of each bound a trial takes: above 1 it is over."""
        budget, found = self.budget, dict[str, float]()
        if budget.drop is not None:
            found["drop"] = trial.drop[2] / budget.drop  # the whole interval is within
        if budget.size is not None:
            found["size"] = budget.size.used(trial.nbytes, self.given_nbytes)
        if budget.latency is not None and trial.latency is not None:
            share = budget.latency.share
            took = 1 / trial.latency["ratio"][0] if share else trial.latency["after"][0]
            found["latency"] = budget.latency.used(took, 1.0)
        return found

    def bounds(self) -> Facts:
        """The most drop and bytes, and the least speed over the given model's; None is no bound."""
        size, latency = self.budget.size, self.budget.latency
        times = [trial.latency["before"][0] for trial in self.found.values() if trial.latency]
        given = 1.0 if latency is not None and latency.share else next(iter(times), None)
        return {
            "drop": self.budget.drop,
            "nbytes": None if size is None else size.most * (self.given_nbytes if size.share else 1),
            "ratio": None if latency is None or given is None else given / latency.most,
        }

    def over(self, trial: Trial) -> list[str]:
        """The bounds that a trial does not meet."""
        return [word for word, used in self.used(trial).items() if not used <= 1]

    def loses_little(self, trial: Trial) -> bool:
        return not trial.why and "drop" not in self.over(trial)

    def small_and_fast(self, trial: Trial) -> bool:
        return not trial.why and not {"size", "latency"} & set(self.over(trial))

    def in_words(self, trial: Trial) -> str:
        """ "drop +0.25 (+0.10 to +0.40), 12,345 bytes (4.1 %), 1.93 x as fast; over: latency"."""
        if trial.why:
            return f"refused: {trial.why}"
        amount, low, high = trial.drop
        text = f"drop {amount:+.3g} ({low:+.3g} to {high:+.3g}), {whole(trial.nbytes)} bytes"
        text += f" ({percent(trial.nbytes / self.given_nbytes, 1)})"
        text += f", {trial.latency['ratio'][0]:.2f} x as fast" if trial.latency else ""
        text += f"; its training was too short: it reached {trial.reached:.2g} bits" if trial.short else ""
        return text + (f"; over the budget: {', '.join(over)}" if (over := self.over(trial)) else "")


def read_facts(path: Path, same: Facts) -> Facts | None:
    """What a file says was measured; None if there is none, it is damaged, or of something else."""
    try:
        kept = json.loads(path.read_text())
        facts = kept["facts"]
        if kept["of"] != same or kept["sha256"] != digest(facts):
            return None
        return {**facts, "drop": tuple(float(end) for end in facts["drop"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def digest(facts: Facts) -> str:
    """SHA-256 of facts, before they are written or after they were read."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of(decide: Deciding) -> str:
    """Of the given model's scores: other data of the same number, or another metric, give another."""
    scores = decide.before
    data = in_bytes(scores).numpy().tobytes() if isinstance(scores, Tensor) else b""
    return hashlib.sha256(data + repr(decide.metric.of(scores)).encode()).hexdigest()[:16]


def reached(trial: Trial, state: State) -> float | None:
    """The bits for each weight that a training under a price came to; None if the trial has none."""
    at = state.ledger.count - len(trial.steps)
    notes = [
        e for e in state.ledger.notes("trained", at) if e.step == at and trial.steps[0].name == "penalize"
    ]
    if not notes:
        return None
    priced = {entry.site for entry in state.ledger.edits(at) if entry.step == at}
    return 8 * notes[-1].data["nbytes"] / sum(math.prod(state.forms[name].shape) for name in priced)


def trials_in(folder: Path) -> list[Path]:
    """What searches wrote there: folders with a journal, or with what was measured."""
    inside = [*folder.iterdir()] if folder.is_dir() else []
    return [path for path in inside if (path / JOURNAL).is_dir() or (path / FACTS).is_file()]


def remove_trials(folder: Path) -> None:
    """Remove what searches wrote, and the folder if it holds nothing else."""
    for path in trials_in(folder):
        shutil.rmtree(path)
    (folder / LOCKED).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def unchanged(before: State, after: State) -> bool:
    """Whether all weights are the same."""
    old, new = ({name: form.digest for name, form in state.forms.items()} for state in (before, after))
    return old == new
