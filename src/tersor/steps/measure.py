"""Measure: scores and bytes of the current model, compared with the given one. Yields notes only.

The task's metric with a 95 % interval, the paired drop and its test; bytes and bits a weight against the
entropy bound; with latency=true the median time in a runtime, both models in turn in one process; with
saturate=true the metric where sums of two 8-bit products are clipped to 16 bits (saturated.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.measure.bits import bits_of
from tersor.model.part import in_words
from tersor.model.sites import select
from tersor.record.events import Group, Note
from tersor.runtimes import MOST_THREADS, RUNTIMES, check_runtime, runtime
from tersor.setting_effects import Only, check_effect
from tersor.settings import check, check_settings, check_word
from tersor.steps.saturated import scored


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Note the task's metric, bytes and bits, with intervals and tests."""

    name: ClassVar[str] = "measure"
    only: ClassVar[Only] = dict.fromkeys(("runtime", "threads", "batch"), {"latency": (True,)})
    lossless: ClassVar[bool] = True
    latency: bool = False  # also time both models in a runtime
    saturate: bool = False  # also score integers as processors without VNNI instructions compute them
    runtime: str = "onnxruntime"  # that latency is measured in
    threads: int = 1  # of the runtime
    batch: int = 1  # samples a call
    where: str | tuple[str, ...] = "*"  # sites whose bits are noted one by one

    def __post_init__(self) -> None:
        check_settings(self)
        check_word(self, "runtime", RUNTIMES)
        check(1 <= self.threads <= MOST_THREADS, self, "threads", f"it is a count: 1 to {MOST_THREADS}")
        check(self.batch >= 1, self, "batch", "it is a count of samples: 1 or more")
        check_effect(self)
        if self.latency:
            check_runtime(self.runtime, self.name)

    @property
    def needs(self) -> Needs:
        return Needs.WHOLE | Needs.SCORES

    def run(self, view: View) -> Iterator[Group]:
        sites = select(view.sites, self.where, self.name)
        notes = []
        for site in sites:
            bits = bits_of(view.form(site))
            text = f"{bits.per_weight:.3f} bits a weight, order-0 bound {bits.bound_per_weight:.3f}"
            notes.append(Note(site.name, "bits", text, {"stored": bits.stored, "bound": bits.bound}))
        before, after = view.state.given_nbytes, view.state.nbytes
        if before is None:
            text = f"{after} bytes of arrays now; the given bytes are unknown, since modules were replaced"
            notes.append(Note("", "nbytes", text, {"after": after}))
        else:
            text = f"{before} to {after} bytes of arrays"
            notes.append(Note("", "nbytes", text, {"before": before, "after": after}))
        if view.maybe_task is not None and view.state.given is not None:
            notes += self.scores(view)
            if self.saturate:
                notes.append(scored(view))
            if self.latency and view.state.base is not None:
                notes.append(self.times(view))
            elif self.latency:
                why = "there are no first weights to time"
                notes.append(Note("", "skipped", f"latency is not measured: {why}"))
        else:
            notes.append(Note("", "skipped", "no task or no model: accuracy and latency are not measured"))
        yield Group("all", tuple(notes))

    def scores(self, view: View) -> list[Note]:
        from tersor.measure.accuracy import compared, estimated, in_words, named

        task, metric = view.task, view.task.scored
        if view.state.base is None:
            now = estimated(task.scores(view.model()), metric)
            text = f"{now.value:.4f} now; the drop is unknown, since the first weights are missing"
            return [Note("", "scored", text, {"after": now.value, "n": now.n, **named(metric)})]
        found = compared(task.scores(view.base()), task.scores(view.model()), metric)
        return [Note("", "accuracy", f"{in_words(found)} (p = {found['p']:.3g})", found)]

    def times(self, view: View) -> Note:
        from tersor.measure.latency import interleave, ratio
        from tersor.model.example import example_inputs
        from tersor.runtimes.agree import sized, tensors

        writer = runtime(self.runtime)
        names, part = view.task.parts, view.part
        inputs = sized(example_inputs(part.task, part.plain()), self.batch)
        named = inputs if isinstance(inputs, dict) else {}
        arrays = [] if named else tensors(inputs)
        by_name = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        with tempfile.TemporaryDirectory() as folder:
            runs = {}
            for word, model in (("before", part.base()), ("after", part.deployed())):
                path = Path(folder) / f"{word}.onnx"
                written = writer.write(model, inputs, path, dynamic_batch=False)
                session = writer.open(written.path, threads=self.threads)
                runs[word] = partial(session.run, *arrays, **by_name)
            timings = interleave(runs)
        middle, low, high = ratio(timings["before"], timings["after"])
        data: dict[str, Any] = {word: [t.median_ms, t.low, t.high] for word, t in timings.items()}
        data |= {"ratio": [middle, low, high], "batch": [self.batch], "threads": [self.threads]}
        data |= {"runtime": self.runtime}
        was, now = timings["before"].median_ms, timings["after"].median_ms
        of = f" of {in_words(names)}" if names else ""
        data |= {"parts": list(names)} if names else {}
        where = f"{RUNTIMES[self.runtime].title}, batch {self.batch}"
        text = f"{was:.4f} to {now:.4f} ms{of} in {where}, {middle:.2f}x as fast"
        return Note("", "latency", text, data, timed=True)
