"""Calibration shift: whether the training data have other values on the edges than the calibration batches.

spread    of an edge: from 0 to where 99 % of its values are, on both sides; of a few batches of each set
A grid that is too narrow clips values, one that is too wide wastes codes, and neither shows in an error. The
usual reason is a transform that one of the two sets does not have.
Cost: a few batches of each set.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from tersor.errors import few
from tersor.model.batches import steady
from tersor.model.observe import values_of
from tersor.model.task import Task
from tersor.record.events import Note
from tersor.steps.drop_search import Part

SAMPLES = 128  # of each set
MIDDLE = 99.0  # percent of the values: the outermost ones of few samples say little
FAR = 1.5  # times as wide: the middle of two draws from the same data differs by less
SHARE = 0.25  # of the edges that must be far: those of few values vary


def shifts(model: nn.Module, task: Task, edges: Iterable[str]) -> Iterator[Note]:
    """A note if the values of the training data have another spread than those of calibration."""
    if task.calibrate is None or task.train is None or task.calibrate is task.train:
        return
    names = list(edges)
    given, other = (spreads(model, task, names, word) for word in ("calibrate", "train"))
    ratios = {name: other[name] / given[name] for name in given if name in other}
    far = {name: ratio for name, ratio in ratios.items() if not 1 / FAR < ratio < FAR}
    if not far or len(far) < SHARE * len(ratios):
        return
    worst = sorted(far.items(), key=lambda item: -max(item[1], 1 / item[1]))
    text = (
        f"calibration batches are unlike the training data: on {len(far)} of {len(ratios)} edges the values "
        f"of training spread {statistics.median(far.values()):.2g} x as wide: "
        + few(f"{name} {ratio:.2g} x" for name, ratio in worst)
        + ". Give both sets the same transforms"
    )
    yield Note("", "calibration", text, {"edges": len(ratios), "far": far})


def spreads(model: nn.Module, task: Task, names: list[str], word: str) -> dict[str, float]:
    """The spread of each edge on a few batches of a set, without edges that are all 0."""
    with steady(getattr(task, word)):
        some = replace(task, calibrate=list(Part(task, word, most=SAMPLES)))
    refused: dict[str, str] = {}
    found = {}
    for name, values in values_of(model, some, names, range="percentile", refused=refused).items():
        ends = None if name in refused else values.range(percentile=MIDDLE)
        if ends is not None and (spread := max(float(end.abs().max()) for end in ends)):
            found[name] = spread
    return found
