"""Progress: bars on stderr if it is a terminal, else plain lines: one for each step, and one every 10 s.

The lines come also while one tensor is coded or a file is written. Runs report to an Observer
(record/observer.py); the observers here print for people. Nothing goes to stdout.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tersor.errors import one_line
from tersor.model.calibration import watched
from tersor.record.observer import Observer
from tersor.report.console import seconds, talk
from tersor.threads import first

EVERY = 10.0  # seconds between lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def watching(*, quiet: bool = False, plain: bool = False) -> Iterator[Observer]:
    """An observer that shows bars on a terminal, lines elsewhere (a log, a notebook), and nothing if `quiet`.
    `plain`: a line for each step alone, on terminals too; the answer is read by a program then."""
    if quiet or not first():
        logger = logging.getLogger("tersor")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield Observer()
        finally:
            logger.setLevel(before)
    elif plain:
        yield Lines()
    elif not sys.stderr.isatty():
        lines = Lines(EVERY)
        with beating(lines, EVERY / 2), watched(lines.batch):
            yield lines
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.fields[label]}", markup=False), BarColumn(24), TimeElapsedColumn())
        text = TextColumn("{task.description}", markup=False)
        with Progress(*columns, text, console=Console(file=sys.stderr), transient=True) as bars:
            observer = Bars(bars)
            with watched(observer.batch):
                yield observer
            observer.end()


class Passes:
    """The passes of a step over the calibration batches, in words."""

    def __init__(self) -> None:
        self.count = 0

    def batch(self, number: int, total: int | None) -> str:
        self.count += number == 1
        of = "" if total is None else f" of {total}"
        return f"calibration batch {number}{of}, pass {self.count}"


class Lines(Observer):
    """One line on stderr for each step, and one every `every` seconds of a step; None: only for each step."""

    def __init__(self, every: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.every, self.clock = every, clock
        self.label, self.part, self.began, self.told = "", "", clock(), clock()
        self.passes, self.at = Passes(), ""

    def step(self, number: int, total: int, name: str) -> None:
        self.label, self.part, self.began = f"[{number}/{total}] {name}", "", self.clock()
        self.passes, self.at = Passes(), ""
        self.told = self.began
        talk(self.label)

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.part, self.at = f"{done} of {total}" + (f", {text}" if text else ""), ""
        self.beat()

    def batch(self, number: int, total: int | None) -> None:
        self.at = self.passes.batch(number, total)
        self.beat()

    def ended(self, name: str, seconds: float) -> None:
        self.part, self.at = "done, working on the results", ""

    def beat(self) -> None:
        """A line, if the last one is old: what was reported last, and the time that the step takes so far."""
        if self.every is None or not self.label or (now := self.clock()) - self.told < self.every:
            return
        self.told = now
        talk(f"{self.label}: {', '.join(filter(None, (self.part, self.at, seconds(now - self.began))))}")

    def message(self, text: str) -> None:
        talk(text)


@contextmanager
def beating(lines: Lines, every: float) -> Iterator[None]:
    """A beat every `every` seconds until the end: a step reports nothing while it codes one tensor."""
    over = threading.Event()

    def beats() -> None:
        while not over.wait(every):
            lines.beat()

    thread = threading.Thread(target=beats, name="tersor-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Bars(Observer):
    """A bar for each step. When the step ends, a line with its time replaces the bar."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.now: TaskID | None = None
        self.label, self.part, self.began, self.passes = "", "", 0.0, Passes()

    def step(self, number: int, total: int, name: str) -> None:
        self.end()
        self.label, self.began = f"[{number}/{total}] {one_line(name)}", time.perf_counter()
        self.part, self.passes = "", Passes()
        self.now = self.bars.add_task("", total=None, label=self.label)

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self.now is not None:
            self.part = one_line(text)
            self.bars.update(self.now, completed=done, total=total, description=self.part)

    def batch(self, number: int, total: int | None) -> None:
        if self.now is not None:
            words = ", ".join(filter(None, (self.part, self.passes.batch(number, total))))
            self.bars.update(self.now, description=words)

    def message(self, text: str) -> None:
        self.bars.console.print(one_line(text), markup=False, highlight=False)

    def end(self) -> None:
        """Replace the bar of the finished step by a line."""
        if self.now is not None:
            self.bars.remove_task(self.now)
            self.now = None
            took = seconds(time.perf_counter() - self.began)
            self.bars.console.print(f"{self.label}  {took}", markup=False, highlight=False)
