"""Drop search: measure a drop of the task's metric on samples that do not judge the result.

set     every second calibration batch if they have targets and are enough; the others give the statistics.
        Else training batches. Up to 65,536 samples. Never evaluation samples that judge: a choice among many
        tries on a set favors those that were lucky on it
drop    paired by sample with the given weights, as in reports (measure/accuracy.py). A result is within a
        limit if the 95 % interval of its drop ends within it
A network that knows its training images by heart loses more on them than on others, because any change of an
answer is a loss there. Held-out calibration batches with targets therefore give smaller files.
Cost: one pass over the set for each try.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tersor.errors import RefusedError
from tersor.measure.accuracy import Drop, compared, drop
from tersor.model.batches import steady
from tersor.model.metric import Metric
from tersor.model.outputs import tensors_of
from tersor.model.task import Batches, Task
from tersor.record.events import Note

MOST = 1 << 16  # samples
# Of a limit: the interval of no change at all must end within it, or another set is taken if there is one.
ROOM = 0.1
NAMES = {"calibrate": "calibration", "evaluate": "evaluation", "train": "training"}
FEW = 50  # resamples of a metric of lists, whose value takes long to compute


class Part:
    """Every second batch of a set, or all of them, up to `most` samples. The generators are those of the
    loader, so that `steady` gives the same samples in every pass."""

    def __init__(self, task: Task, word: str, first: int = 0, of: int = 1, most: float = math.inf) -> None:
        self.batches, loader = task.batches(word), getattr(task, word)
        self.generator, self.sampler = (getattr(loader, name, None) for name in ("generator", "sampler"))
        self.first, self.of, self.most = first, of, most

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in itertools.islice(self.batches, self.first, None, self.of):
            yield batch
            count += len(next((x for x in tensors_of(batch) if x.ndim), "1"))
            if count >= self.most:
                return


@dataclass(frozen=True)
class Deciding:
    """The set that decides, and the scores of the given weights on it."""

    limit: float  # of the drop
    word: str  # "calibrate", "evaluate" or "train"
    task: Task  # its evaluation set is the deciding one
    before: Any
    rest: Task  # its calibration batches did not decide

    @property
    def count(self) -> int:
        return len(self.before)

    @property
    def name(self) -> str:
        return f"{self.count} {NAMES[self.word]} samples"

    @property
    def metric(self) -> Metric:
        metric = self.task.scored
        slow = isinstance(self.before, list) and metric.resamples is None
        return replace(metric, resamples=FEW) if slow else metric

    @property
    def least(self) -> float:
        """The least drop that the set can show: the end of the interval of no change at all."""
        return drop(self.before, self.before, self.metric).high

    def drop(self, model: nn.Module) -> Drop:
        """The drop of a model from the given weights."""
        return drop(self.before, self.task.scores(model), self.metric)

    def note(self, task: Task, before: nn.Module, after: nn.Module) -> Note:
        """Which set decided, and what the evaluation set, which did not, says of the result."""
        found = compared(self.before, self.task.scores(after), self.metric)
        judged = compared(task.scores(before), task.scores(after), task.scored)
        text = (
            f"max_drop={self.limit:g} was decided by {self.name}: {in_drop(found)}. Judged once by "
            f"{judged['n']} evaluation samples, which decided nothing: {in_drop(judged)}"
        )
        return Note(
            "", "decided", text, {"set": self.word, "limit": self.limit, "found": found, "judged": judged}
        )


def deciding(
    task: Task,
    model: nn.Module,
    limit: float,
    who: str,
    *,
    word: str = "max_drop",
    held: Batches | None = None,
) -> Deciding:
    """The set on which a drop of `model` up to `limit` is searched. RefusedError if no set can show it, or if
    the limit, which `word` names in messages, allows any model. `held`: evaluation batches that do not judge,
    which are taken before training batches."""
    found = None
    if has_targets(task, "calibrate"):
        decide = replace(task, evaluate=Part(task, "calibrate", 1, 2, MOST))
        rest = replace(task, calibrate=Part(task, "calibrate", 0, 2))
        found = Deciding(limit, "calibrate", decide, decide.scores(model), rest)
    if held is not None and (found is None or found.least > ROOM * limit):
        decide = replace(task, evaluate=held)
        found = Deciding(limit, "evaluate", decide, decide.scores(model), task)
    room = ROOM if held is None else 1.0
    if has_targets(task, "train") and (found is None or found.least > room * limit):
        decide = replace(task, evaluate=Part(task, "train", most=MOST))
        found = Deciding(limit, "train", decide, decide.scores(model), task)
    if found is None:
        raise RefusedError(
            f"{who}: {word} is searched on batches with targets that do not judge the result, and "
            f"task {task.name!r} has no others. Give Task(calibrate=...), two batches or more with targets, "
            f"best held out from training, or Task(train=...)"
        )
    if found.least > limit:
        unit = task.scored.unit
        raise RefusedError(
            f"{who}: {found.name} cannot show a drop within {word}={limit:g}: without any change the "
            f"95 % interval ends at {found.least:.3g}{unit and f' {unit}'}. Give more batches with targets, "
            f"Task(calibrate=...) or Task(train=...); or allow a larger drop"
        )
    value, unit = found.metric.of(found.before), found.metric.unit
    whole = 100 * value if unit else value  # drops are in points
    if found.metric.better == "higher" and 0 < whole <= limit < math.inf:
        if unit:
            why, way = f"is in {unit}, of which the given model has", ""
        else:
            why = "is in the metric's own unit, in which the given model has"
            way = "; if the metric is a share, Metric(..., percent=True) has drops in points"
        raise RefusedError(
            f"{who}: {word}={limit:g} {why} {whole:.4g}, so any model is within it. A hundredth of it is "
            f"{word}={0.01 * whole:.2g}{way}"
        )
    return found


def has_targets(task: Task, word: str) -> bool:
    """Whether the task has this set with a target in its first batch, and enough batches to be split."""
    if getattr(task, word) is None:
        return False
    with steady(getattr(task, word)):
        some = list(itertools.islice(task.batches(word), 2))
    return len(some) > (word == "calibrate") and task.maybe_target(some[0]) is not None


def in_drop(found: Mapping[str, Any]) -> str:
    """ "drop +0.25 points, 95 % interval +0.10 to +0.40"."""
    amount, *ends = found["drop"]
    low, high = ("unknown" if end is None else f"{end:+.3g}" for end in ends)
    unit = found.get("unit", "points")
    return f"drop {amount:+.3g}{unit and f' {unit}'}, 95 % interval {low} to {high}"
