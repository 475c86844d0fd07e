"""Agreement: whether a runtime computes the same outputs as the model.

max_abs = max |a - b|      max_rel = max |a - b| / max |a|      rms_rel = |a - b| / |a|, Euclidean norms
agree = share of samples with the same argmax
a is torch's output, b the runtime's. The relative error is taken against the largest number, not against each
one: a number near zero would otherwise have a large error that does not matter. But each output is compared
alone, and so is each of its channels: a large one must not hide an error of another. Cost: some passes over
the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tersor.errors import RefusedError, TaskError
from tersor.model.batches import device_of, evaluating, move, shapes
from tersor.model.deployed import Deployed
from tersor.model.outputs import exportable
from tersor.runtimes import RUNTIMES
from tersor.runtimes.contained import contained
from tersor.runtimes.output_names import tensors_by_path
from tersor.runtimes.sessions import Feed, as_array, first_run, opened

TOLERANCE = 1e-3  # largest allowed difference over the largest output: float32 sums in another order
# Where edges have grids, the root mean square of the difference over that of the outputs may be this, or as
# much as the rounding of the edges itself. A sum in another order can round to the next step, and each later
# layer sees it: two correct programs then differ almost as much as each differs from the exact one.
INTEGERS = 0.05
CHANNEL = 0.25  # the same for one channel of an output, or twice the rounding: chance counts in few numbers
ROUNDING = 1e-5  # of the largest output of all: a smaller difference is rounding, in whichever output

Inputs = tuple | dict[str, Any]  # arguments of the model: in order, or by name


@dataclass(frozen=True)
class Difference:
    """The difference of a runtime's outputs from torch's, over all compared samples."""

    max_abs: float  # in units of the output
    max_rel: float  # against the largest number of torch in the same channel of the same output
    rms_rel: float  # root mean square of the difference over that of torch's numbers, of the worst output
    agree: float | None  # share of samples whose first output has its largest entry in the same place
    samples: int


class Tally:
    """Sums over the compared batches, at each index of an output's axis, [C], or of the whole output, [1]."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.apart = self.power = self.furthest = self.largest = np.zeros(1)

    def add(self, apart: np.ndarray, size: np.ndarray) -> None:
        """`apart`, `size` [B, ...]: the absolute differences and what they are compared with."""
        rest = tuple(k for k in range(apart.ndim) if k != self.axis)
        self.apart = combined(np.add, self.apart, np.square(apart).sum(rest))
        self.power = combined(np.add, self.power, np.square(size).sum(rest))
        self.furthest = combined(np.maximum, self.furthest, apart.max(rest))
        self.largest = combined(np.maximum, self.largest, size.max(rest))

    def rms(self) -> np.ndarray:
        """The root mean square of the difference over that of the outputs."""
        return np.sqrt(quotient(self.apart, self.power))


class Comparison:
    """Gathers the differences of many batches, by output, and by index of axis 1 and of the last one, where
    channels are: 4 places and 80 classes of a detector, say. Places of 640 would hide any error of scores."""

    def __init__(self) -> None:
        self.wholes: list[Tally] = []
        self.slices: list[list[Tally]] = []
        self.hits, self.judged, self.samples = 0, 0, 0

    def add(self, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
        """Add one batch's outputs of torch and of the runtime. RefusedError if their shapes differ."""
        if [a.shape for a in ours] != [b.shape for b in theirs]:
            raise RefusedError(
                f"compare: torch gives outputs of {[list(a.shape) for a in ours]}, "
                f"the runtime of {[list(b.shape) for b in theirs]}."
            )
        if not self.wholes:
            self.wholes = [Tally(None) for _ in ours]
            self.slices = [[Tally(axis) for axis in sorted({1, a.ndim - 1}) if axis > 0 and a.ndim > 1]
                           for a in ours]  # fmt: skip
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not a.size:
                continue
            a, b = np.atleast_1d(a).astype(np.float64), np.atleast_1d(b).astype(np.float64)
            with np.errstate(invalid="ignore"):
                apart = np.abs(a - b)
            apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0  # equal infinities have no distance
            apart[np.isnan(apart)] = np.inf
            size = np.abs(np.where(np.isfinite(a), a, 0.0))
            for tally in (self.wholes[k], *self.slices[k]):
                tally.add(apart, size)
        first, other = ours[0], theirs[0]
        counted = next((a for a in ours if a.ndim), None)
        self.samples += 1 if counted is None else len(counted)
        if first.ndim >= 2 and first.shape[1] > 1 and len(first):
            same = (first.argmax(1) == other.argmax(1)).reshape(len(first), -1)  # [B, positions]
            self.hits += int(same.sum())
            self.judged += same.size

    def result(self) -> Difference:
        """The difference over all batches. RefusedError if there was none."""
        if not self.samples:
            raise RefusedError("compare: no batch to compare on.")
        furthest = max(float(each.furthest[0]) for each in self.wholes)
        largest = max(float(each.largest[0]) for each in self.wholes)
        relative = [
            quotient(np.where(each.furthest <= ROUNDING * largest, 0.0, each.furthest), each.largest).max()
            for each in (*self.wholes, *chain(*self.slices))
        ]
        agree = self.hits / self.judged if self.judged else None
        rms = max(float(each.rms()[0]) for each in self.wholes)
        return Difference(furthest, float(max(relative)), rms, agree, self.samples)


def combined(how: np.ufunc, a: np.ndarray, b: np.ndarray) -> Any:
    """how(a, b) of [C] and [D]; the shorter one ends with zeros. Batches may have other numbers of tokens."""
    size = max(a.size, b.size)
    return how(*(np.pad(np.atleast_1d(x), (0, size - x.size)) for x in (a, b)))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == 0, 0.0, np.where(b == 0, np.inf, a / b))


def strays(files: Comparison, rounding: Comparison) -> tuple[float, float] | None:
    """(relative difference, what is allowed) where a file differs from the simulation by more than rounding
    does, in an output or in a channel of one."""
    for mine, its, least, times in (
        (files.wholes, rounding.wholes, INTEGERS, 1),
        ([*chain(*files.slices)], [*chain(*rounding.slices)], CHANNEL, 2),
    ):
        for found, by_rounding in zip(mine, its, strict=True):
            allowed = np.maximum(least, times * by_rounding.rms())
            off = (found.rms() > allowed) & ((found.power > 0) | (least == INTEGERS))
            if off.any():
                at = int(np.argmax(off * found.rms()))
                return float(found.rms()[at]), float(allowed[at])
    return None


def compared(
    runtime: str,
    model: nn.Module,
    path: str | Path,
    batches: Iterable[Any],
    tolerance: float | None,
    *,
    first: bool = False,
) -> Difference:
    """Run batches of inputs through the model and through the file in a runtime of the table.

    `first`: the runtime has not seen this file, so it runs in a child process (contained.py), which gets all
    batches at once. RefusedError if an output differs by more than `tolerance`, relative to the largest in
    its channel; if edges have grids, by more than INTEGERS or the rounding. None allows any difference.
    """
    path, comparison, rounding = Path(path), Comparison(), Comparison()
    rounded = isinstance(model, Deployed) and model.table
    for inputs, theirs in runs(runtime, path, map(as_inputs, batches), first):
        comparison.add(ours := outputs(model, inputs), theirs)
        if rounded:
            rounding.add(outputs(cast(Deployed, model).net, inputs), ours)
    difference = comparison.result()
    if tolerance is None:
        return difference
    if rounded:
        found, of = strays(comparison, rounding), "their size (root mean square)"
    else:
        found, of = (difference.max_rel, tolerance), "the largest in a channel"
        found = None if difference.max_rel <= tolerance else found
    if found:
        raise RefusedError(
            f"{runtime}: {path.name} does not compute what {name_of(model)} does: they differ by "
            f"{difference.max_abs:.3g}, {found[0]:.3g} of {of}; allowed: {found[1]:.3g}."
        )
    return difference


def name_of(model: nn.Module) -> str:
    """The class that the user knows."""
    return type(model.net if isinstance(model, Deployed) else model).__name__


def runs(
    runtime: str, path: Path, batches: Iterable[Inputs], first: bool
) -> Iterator[tuple[Inputs, list[np.ndarray]]]:
    """Each batch with the runtime's outputs."""
    if first:
        batches = list(batches)
        who = f"{runtime}: {RUNTIMES[runtime].title} cannot run {path.name}"
        found = contained(first_run, runtime, path, list(map(feed_of, batches)), who=who)
        yield from zip(batches, found, strict=True)
        return
    session = opened(runtime, path)
    for inputs in batches:
        arrays, named = feed_of(inputs)
        yield inputs, session.run(*arrays, **named)


def feed_of(inputs: Inputs) -> Feed:
    """What a runtime gets: the tensors in order, or by name."""
    if isinstance(inputs, dict):
        return [], {name: as_array(item) for name, item in tensors_by_path(inputs)}
    return [as_array(item) for item in tensors(inputs)], {}


def outputs(model: nn.Module, inputs: Inputs) -> list[np.ndarray]:
    """The tensors in the model's output, in order, as arrays. Runs in eval mode; the model's mode is
    restored."""
    inputs = move(inputs, device_of(model))
    with evaluating(model):
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    found, _ = exportable(found)
    if isinstance(found, dict):  # Hugging Face's outputs are dicts that hide entries of None
        found = {key: item for key, item in found.items() if item is not None}
    return [
        item.float().cpu().numpy() if item.dtype is torch.bfloat16 else item.cpu().numpy()
        for item in tensors(found)
    ]


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [item for item in tree_leaves(value) if isinstance(item, Tensor)]


def sized(inputs: Inputs, samples: int) -> Inputs:
    """The inputs with this number of samples, repeated if there are fewer. The batch is the first dimension
    of the first tensor, and of all others with the same length there."""
    size = tensors(inputs)[0].shape[:1]

    def change(item: Any) -> Any:
        if not isinstance(item, Tensor) or not item.ndim or item.shape[:1] != size or not len(item):
            return item
        return torch.cat([item] * math.ceil(samples / len(item)))[:samples]

    found: Inputs = tree_map(change, inputs)
    return found


def as_inputs(batch: Any) -> Inputs:
    """Inputs from a caller's tuple or list (in order), dict (by name) or single tensor."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, dict):
        return batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    raise TaskError(f"inputs of a model are a tuple, a dict by name or one tensor, not {shapes(batch)}")
