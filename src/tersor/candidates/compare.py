"""Compare: two candidates on one task: accuracy in pairs, equal decisions, bytes, and time in a runtime.

drop       of B against A, paired by sample, with its 95 % interval and test (measure/accuracy.py)
same       share of the positions at which both decide the same, right or wrong
latency    both in turn in one process, and A against itself (timed.py)
"""

from __future__ import annotations

from typing import Any

from tersor.candidates.candidate import BASE, Candidate
from tersor.candidates.scored import Scored, scored
from tersor.candidates.timed import timed
from tersor.errors import SettingError
from tersor.measure.accuracy import compared
from tersor.model.needs import Needs
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.runtimes import MOST_THREADS, check_runtime


def compare(
    a: Candidate, b: Candidate, task: Task, *,
    latency: bool = False, batch: int | None = None, threads: int | None = None, runtime: str = "onnxruntime",
    observer: Observer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The facts, as JSON: a, b, task, metric, strange (a file that was not made from base), accuracy (before:
    A, after: B), decisions {same, of}, or {why} if the outputs are no decisions, seconds of the two passes;
    with `latency` those of timed(), for `batch` samples a call on `threads` threads of `runtime`, 1 each if
    not given. TaskError if the task does not fit one of the candidates."""
    observer = observer or Observer()
    for word, value in (("batch", batch), ("threads", threads)):
        if value is not None and not latency:
            raise SettingError(f"compare: {word}={value} is for latency; give --latency too, or leave it out")
        if value is not None and value < 1:
            raise SettingError(f"compare: {word}={value}, but it is a count: 1 or more")
        if word == "threads" and value is not None and value > MOST_THREADS:
            raise SettingError(f"compare: {word}={value}, but it is a count: 1 to {MOST_THREADS}")
    if latency:
        check_runtime(runtime, "compare")
    for of in (a, b):
        task.check(of.module, Needs.SCORES)  # B's misfit is found before A is scored
    total = 2 + latency
    facts: dict[str, Any] = {
        "a": a.facts, "b": b.facts, "task": task.name, "metric": task.scored.name, "strange": strange(a, b)
    }  # fmt: skip
    if latency:  # first, because an export can fail
        observer.step(1, total, f"time in {runtime}")
        facts["latency"] = timed(
            a, b, task, runtime=runtime, batch=batch or 1, threads=threads or 1, observer=observer
        )
    found = []
    for number, of in enumerate((a, b), total - 1):
        observer.step(number, total, f"score {of.name}")
        found.append(scored(of, task, observer, decide=True))
    first, second = found
    facts["accuracy"] = compared(first.scores, second.scores, task.scored)
    facts["decisions"] = same(first, second)
    facts["seconds"] = [first.seconds, second.seconds]
    return facts


def strange(a: Candidate, b: Candidate) -> str:
    """The name of the .tersor file that was not made from the other candidate, the word base; "" if it was,
    or if there are no two such."""
    for first, second in ((a, b), (b, a)):
        if first.name == BASE and second.kind == "tersor" and first.state and second.state:
            made = second.state.ledger
            return second.name if made.entries and made.base != first.state.digest else ""
    return ""


def same(a: Scored, b: Scored) -> dict[str, Any]:
    """At how many of the positions both decide the same, or why that is not known."""
    if a.decisions is None or b.decisions is None:
        return {"why": a.why or b.why}
    if len(a.decisions) != len(b.decisions):
        return {"why": f"A decides at {len(a.decisions)} positions, B at {len(b.decisions)}"}
    return {"same": int((a.decisions == b.decisions).sum()), "of": len(a.decisions)}
