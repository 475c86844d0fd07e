"""Timed: two candidates in one runtime, in turn, and the first one against itself.

ratio   time of A / time of B, the median of the rounds' ratios with its 95 % interval: above 1, B is faster
A/A     the same of two sessions of A's file, in the same rounds: an interval without 1 shows that this
        machine is too noisy, or the place of a file in memory matters too much, to tell such differences
Cost: an export of each candidate that is no file of the runtime yet; 40 rounds of 4 ms or one call a session.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.candidates.candidate import Candidate
from tersor.candidates.export import write
from tersor.core.view import View
from tersor.errors import RefusedError, SettingError
from tersor.measure.latency import interleave, ratio
from tersor.model.example import example_inputs
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.runtimes import runtime as runtime_named
from tersor.runtimes.agree import Inputs, sized, tensors
from tersor.steps import Export

AGAIN = "a again"


def timed(
    a: Candidate, b: Candidate, task: Task, *,
    runtime: str = "onnxruntime", batch: int = 1, threads: int = 1, observer: Observer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The facts, as JSON: before and after [ms, low, high] a call of A and B, ratio and again [middle, low,
    high], noisy. RefusedError for a candidate that cannot be exported or does not take the batch."""
    observer = observer or Observer()
    step, writer = Export(to=runtime, dynamic_batch=False), runtime_named(runtime)
    # Of a part that the task names, that is timed.
    parts = {
        word: View(of.state, task, "compare", "0", 0, observer).part
        for word, of in (("a", a), ("b", b)) if of.state is not None
    }  # fmt: skip
    # A file's module has no signature to bind inputs by name with.
    shown = next(iter(parts.values()), None)
    given = example_inputs(task, a.module) if shown is None else example_inputs(shown.task, shown.plain())
    inputs = sized(given, batch)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs: dict[str, Callable[[], object]] = {}
        for word, of in (("a", a), ("b", b)):
            path = of.path
            if word in parts:
                path = folder / f"{word}.onnx"
                write(parts[word].state, replace(parts[word].task, example=inputs), path, step)
            for name in (word, AGAIN) if word == "a" else (word,):
                runs[name] = call(writer.open(path, threads=threads), inputs)
                tried(of, runs[name])
        timings = interleave(
            runs, watch=lambda done, rounds: observer.progress(done, rounds, f"{a.name}, {b.name}")
        )
    again = ratio(timings["a"], timings[AGAIN])
    times = {word: [t.median_ms, t.low, t.high] for word, t in timings.items()}
    part = {"parts": list(task.parts)} if task.parts else {}
    return {
        **part, "runtime": runtime, "batch": batch, "threads": threads,
        "before": times["a"], "after": times["b"],
        "ratio": list(ratio(timings["a"], timings["b"])), "again": list(again),
        "noisy": not again.low <= 1 <= again.high,
    }  # fmt: skip


def call(session: Any, inputs: Inputs) -> Callable[[], object]:
    """A call of a session; the inputs are converted once, and are not timed."""
    if isinstance(inputs, dict):
        named = {key: value.cpu().numpy() for key, value in inputs.items() if isinstance(value, Tensor)}
        return partial(session.run, **named)
    return partial(session.run, *(item.cpu().numpy() for item in tensors(inputs)))


def tried(of: Candidate, run: Callable[[], object]) -> None:
    """Call it once, untimed."""
    try:
        run()
    except SettingError as error:
        raise RefusedError(
            f"compare: {error}. --batch is the number of samples in a call: give the one that {of.name} takes"
        ) from error
