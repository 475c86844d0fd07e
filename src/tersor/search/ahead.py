"""Ahead: trials that a search may ask for next run at the same time, on the machines of a Ray cluster.

A search by halving asks for one trial after the other, and what it may ask for next is known: the middles of
both halves. So these run ahead, and those that turn out not to be needed are stopped. A trial's journal comes
back, and the search replays it: it finds what it would find alone. No shared folder is needed.
cluster   the one that RAY_ADDRESS names, else one of this machine's cores, for the time of the search
code      of the user's own modules is sent along; Tersor and other packages must be installed there
times     are measured here when nothing runs ahead
A trial whose worker failed runs here, and that is said.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError, TaskError, TersorError, first_line, need
from tersor.files import LOCKED
from tersor.model.batches import device_of
from tersor.model.code import is_own
from tersor.model.task import Task
from tersor.pipeline import JOURNAL
from tersor.record.observer import Observer

if TYPE_CHECKING:
    from tersor.search.trials import Trial

Files = dict[str, bytes]  # of a journal
# What objects raise that cannot be pickled.
UNSENDABLE = (TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError, pickle.PicklingError)


class RayWorkers:
    """Runs trials of one model and task on a Ray cluster, `count` at once."""

    def __init__(
        self, count: int, given: State, task: Task, *, seed: int, folder: Callable[[Trial], Path],
        observer: Observer,
    ):  # fmt: skip
        try:
            import ray
            from ray import cloudpickle
        except ImportError:
            raise need("ray", "ray", "trials at the same time") from None
        self.count, self.folder, self.observer, self.ray = count, folder, observer, ray
        for module in own_modules(given, task):
            cloudpickle.register_pickle_by_value(module)
        threads, self.dumps = torch.get_num_threads(), cloudpickle.dumps
        try:
            sent = self.dumps((given, task, seed, threads))
        except UNSENDABLE as error:
            raise TaskError(
                f"compress: workers={count}: the model or the task cannot be sent to other processes: "
                f"{first_line(error)}. Leave out workers, or make it without open files, locks and the like"
            ) from error
        self.flying: list[tuple[list[Trial], Any]] = []  # chains, and where their journals will be
        self.stopping: list[Any] = []
        self.began = not ray.is_initialized()
        if self.began:
            ray.init(
                os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False, logging_level=logging.ERROR
            )
        gpus = int(getattr(device_of(given.model()), "type", "cpu") != "cpu")
        if gpus > self.most("GPU"):
            self.close()
            raise SettingError(f"compress: workers={count}: the model is on a GPU, and no worker has one")
        # A worker takes as many threads as this process, on fewer cores if need be: sums depend on it.
        cores = min(threads, self.most("CPU"))
        # A process for each chain: one that was stopped while it imported would fail the next.
        once = {"max_retries": 0, "max_calls": 1}
        self.remote = ray.remote(num_cpus=cores, num_gpus=gpus, **once)(worked)
        self.given = ray.put(sent)  # it stays in the cluster's memory: the model and the data, once

    def most(self, what: str) -> int:
        """The most cores or GPUs that one machine of the cluster has."""
        return int(max(node["Resources"].get(what, 0) for node in self.ray.nodes() if node["Alive"]))

    def ask(self, chains: list[list[Trial]]) -> None:
        """Have these run, as many as there is room for, and no others."""
        wanted = [names(chain) for chain in chains[: self.count]]
        for chain, result in [*self.flying]:
            if names(chain) not in wanted:
                self.ray.cancel(result)  # not by force: what it wrote is to be removed
                self.stopping.append(result)
                self.flying.remove((chain, result))
        for chain in chains[: self.count]:
            missing = [trial.name for trial in chain if not self.journal(trial).exists()]
            busy = {name for other, _ in self.flying for name in names(other)}
            if missing and missing[0] not in busy:  # nothing runs twice at the same time
                steps = [(trial.steps, self.read(trial)) for trial in chain]
                self.flying.append((chain, self.remote.remote(self.given, self.dumps(steps))))

    def take(self, trial: Trial) -> None:
        """Bring the journal of a trial to its folder, when it is done, if it runs here."""
        for chain, result in [*self.flying]:
            if trial.name in names(chain):
                self.flying.remove((chain, result))
                # There are fewer journals if a trial was refused.
                for each, files in zip(chain, self.got(chain, result), strict=False):
                    self.write(each, files)

    def got(self, chain: list[Trial], result: Any) -> list[Files]:
        """The journals of a chain; none if its worker failed."""
        try:
            found: list[Files] = self.ray.get(result)
            return found
        except self.ray.exceptions.RayError as error:
            why = first_line(getattr(error, "cause", None) or error)  # Ray's own first line names a process
            self.observer.message(f"{chain[-1].name}: its worker failed ({why}): it runs here")
            return []

    def settle(self) -> None:
        """Wait until nothing runs."""
        results = [*self.stopping, *(result for _, result in self.flying)]
        if results:
            self.ray.wait(results, num_returns=len(results))
        self.stopping.clear()

    def close(self) -> None:
        """Stop what still runs, and the cluster if it began here."""
        self.ask([])
        self.settle()
        if self.began:
            self.ray.shutdown()

    def journal(self, trial: Trial) -> Path:
        return self.folder(trial) / JOURNAL

    def read(self, trial: Trial) -> Files | None:
        """The journal of a trial that has run."""
        return files_of(self.journal(trial)) if self.journal(trial).exists() else None

    def write(self, trial: Trial, files: Files) -> None:
        """A journal, whole or not at all."""
        if not (journal := self.journal(trial)).exists():
            part = journal.with_name(f"{journal.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            put(files, part)
            part.rename(journal)


def names(chain: list[Trial]) -> list[str]:
    return [trial.name for trial in chain]


def worked(given: bytes, chain: bytes) -> list[Files]:
    """Run trials one after the other, in a worker. The journals of those that were not refused."""
    begin, task, seed, threads = pickle.loads(given)
    torch.set_num_threads(threads)
    state, found = begin, list[Files]()
    with tempfile.TemporaryDirectory(prefix="tersor-ahead-") as folder:
        for number, (steps, files) in enumerate(pickle.loads(chain)):
            out = Path(folder) / str(number)
            journal = out / JOURNAL
            if files is not None:
                put(files, journal)
            try:
                state = run(
                    state, list(steps), task, seed=seed, journal=journal, resume=journal.exists(), out=out
                )
            except TersorError:
                break  # the search is refused too, and says so
            found.append(files_of(journal))
    return found


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCKED}


def put(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def own_modules(given: State, task: Task) -> Iterator[ModuleType]:
    """The modules of the user's own code, which other machines do not have."""
    parts = [type(module) for module in given.model().modules()]
    parts += [value for value in vars(task).values() if hasattr(value, "__module__")]
    names = {part.__module__ for part in parts if is_own(part)} - {"__main__"}  # sent along anyway
    yield from (sys.modules[name] for name in sorted(names) if name in sys.modules)
