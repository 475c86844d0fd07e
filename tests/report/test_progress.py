"""Progress goes to stderr: bars in a terminal, lines elsewhere, nothing if quiet."""

import io
import itertools
import logging
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from tiny import tiny

from tersor.core.run import run
from tersor.model.calibration import watched
from tersor.record.observer import Observer
from tersor.report.progress import EVERY, Bars, Lines, beating, watching
from tersor.steps import Prune, Quantize


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def two_steps(watch: Observer) -> None:
    run(tiny("mlp").model, [Prune(), Quantize()], observer=watch)


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as watch:
        assert isinstance(watch, Lines)
        two_steps(watch)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "[1/2] prune\n[2/2] quantize\n")


def test_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    watch = Lines(EVERY, lambda: now[0])
    watch.progress(1, 2, "before any step")
    watch.step(1, 2, "prune")
    for second in range(26):
        now[0] = second
        watch.progress(second, 40, "epoch 1" if second > 15 else "")
    watch.step(2, 2, "quantize")
    now[0] = 34
    watch.progress(1, 2)
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] prune", "[1/2] prune: 10 of 40, 10.0 s", "[1/2] prune: 20 of 40, epoch 1, 20.0 s",
        "[2/2] quantize",
    ]  # fmt: skip


def test_lines_count_passes_over_the_calibration_batches(capsys: pytest.CaptureFixture[str]) -> None:
    """What was reported last stays before them, until something else is reported; a step counts anew."""
    now = [0.0]
    watch = Lines(EVERY, lambda: now[0])
    watch.step(1, 2, "quantize")
    for second, (number, total) in enumerate([(1, None), (2, None), (1, 2), (2, 2)]):
        now[0] = 10 * second
        watch.batch(number, total)
    watch.progress(3, 5, "conv.weight")
    now[0] = 40
    watch.batch(1, 2)
    now[0] = 50
    watch.progress(4, 5)
    watch.step(2, 2, "prune")
    now[0] = 60
    watch.batch(1, 2)
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] quantize",
        "[1/2] quantize: calibration batch 2, pass 1, 10.0 s",
        "[1/2] quantize: calibration batch 1 of 2, pass 2, 20.0 s",
        "[1/2] quantize: calibration batch 2 of 2, pass 2, 30.0 s",
        "[1/2] quantize: 3 of 5, conv.weight, calibration batch 1 of 2, pass 3, 40.0 s",
        "[1/2] quantize: 4 of 5, 50.0 s",
        "[2/2] prune",
        "[2/2] prune: calibration batch 1 of 2, pass 1, 10.0 s",
    ]


@pytest.mark.parametrize("feed", [None, lambda model, batch: model(batch[0])])
def test_steps_tell_of_the_batches_that_they_use(feed: Any) -> None:
    """Also those of a task with `feed`; nobody is told behind the end."""
    t, told = tiny("mlp"), list[tuple[int, int | None]]()
    on = replace(t.task, feed=feed, target=None if feed is None else lambda batch: batch[1])
    with watched(lambda number, total: told.append((number, total))):
        run(t.model, Quantize(activations=8), on)
    count = len(list(on.batches("calibrate")))
    assert {total for _, total in told} == {count}
    assert (count, count) in told  # whole passes; a trace takes one batch
    assert all(b in (1, a + 1) for (a, _), (b, _) in itertools.pairwise([(0, count), *told]))
    before = len(told)
    run(t.model, Quantize(activations=8), on)
    assert len(told) == before


def test_a_bar_names_the_batch() -> None:
    bars = Progress(console=Console(file=io.StringIO()))
    watch = Bars(bars)
    watch.batch(1, 2)  # before any step
    watch.step(1, 1, "quantize")
    watch.progress(1, 3, "conv.weight")
    watch.batch(1, 4)
    watch.batch(2, 4)
    assert bars.tasks[0].description == "conv.weight, calibration batch 2 of 4, pass 1"
    assert bars.tasks[0].completed == 1


def test_a_line_also_while_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    watch = Lines(EVERY, lambda: now[0])
    watch.beat()
    watch.step(1, 1, "entropy")
    for second in (4, 12):
        now[0] = second
        watch.beat()
    watch.progress(1, 3, "words.weight")
    now[0] = 25
    watch.beat()
    watch.ended("entropy", 25.0)
    now[0] = 36
    watch.beat()
    assert capsys.readouterr().err.splitlines() == [
        "[1/1] entropy",
        "[1/1] entropy: 12.0 s",
        "[1/1] entropy: 1 of 3, words.weight, 25.0 s",
        "[1/1] entropy: done, working on the results, 36.0 s",
    ]


def test_beats_come_by_themselves_until_the_end() -> None:
    count, enough = 0, threading.Event()

    class Counted(Lines):
        def beat(self) -> None:
            nonlocal count
            count += 1
            if count == 3:
                enough.set()

    with beating(Counted(EVERY), 0.001):
        assert enough.wait(60)
    assert all(thread.name != "tersor-progress" for thread in threading.enumerate())


def test_a_program_that_reads_the_answer_gets_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(plain=True) as watch:
        assert isinstance(watch, Lines)
        assert watch.every is None
        watch.step(1, 1, "prune")
        watch.told -= 100
        watch.progress(1, 2)
    assert capsys.readouterr().err == "[1/1] prune\n"
    with watching() as watch:
        assert isinstance(watch, Lines)
        assert watch.every == EVERY


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as watch:
        two_steps(watch)
    assert capsys.readouterr() == ("", "")


def test_bars_in_a_terminal_and_plain_overrules(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with watching(plain=True) as watch:
        assert isinstance(watch, Lines)
    with watching() as watch:
        assert isinstance(watch, Bars)
        two_steps(watch)
    lines = [line for line in screen.getvalue().splitlines() if "[1/2] prune  " in line or "[2/2]" in line]
    assert lines
    assert "quantize  0.0 s" in screen.getvalue()


def bars() -> tuple[Bars, Progress]:
    progress = Progress(console=Console(file=io.StringIO()))
    return Bars(progress), progress


def test_a_bar_follows_the_progress() -> None:
    watch, progress = bars()
    watch.progress(1, 2, "before any step: nothing to show")
    watch.step(1, 2, "prune")
    watch.progress(3, 9, "0.weight [a]")
    (task,) = progress.tasks
    assert (task.completed, task.total, task.description) == (3, 9, "0.weight [a]")
    watch.step(2, 2, "quantize")
    (task,) = progress.tasks
    assert (task.completed, task.fields["label"]) == (0, "[2/2] quantize")
    watch.end()
    assert not progress.tasks


def fails(seen: list[Observer]) -> None:
    with watching() as watch:
        seen.append(watch)
        watch.step(1, 1, "prune")
        raise ZeroDivisionError


def test_a_failing_run_leaves_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen: list[Observer] = []
    with pytest.raises(ZeroDivisionError):
        fails(seen)
    (watch,) = seen
    assert isinstance(watch, Bars)
    assert not watch.bars.live.is_started


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_quiet_about_compiling_too(quiet: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tersor")
    before = logger.level
    with watching(quiet=quiet, plain=True):
        logger.warning("compiling")
    assert ("compiling" in caplog.text) is not quiet
    assert logger.level == before
