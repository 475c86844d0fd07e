"""Agreement: whether a runtime computes the same outputs as the model.

max_abs = max |a - b|      max_rel = max |a - b| / max |a|      rms_rel = |a - b| / |a|, Euclidean norms
agree = share of samples with the same argmax
a is torch's output, b the runtime's. The relative error is taken against the largest output, not against each
one: an output near zero would otherwise have a large error that does not matter. Cost: one pass over the
outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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

Inputs = tuple | dict[str, Any]  # arguments of the model: in order, or by name


@dataclass(frozen=True)
class Difference:
    """The difference of a runtime's outputs from torch's, over all compared samples."""

    max_abs: float  # in units of the output
    max_rel: float  # against the largest output of torch
    rms_rel: float  # root mean square of the difference over that of torch's outputs
    agree: float | None  # share of samples whose first output has its largest entry in the same place
    samples: int


class Comparison:
    """Gathers the differences of many batches."""

    def __init__(self) -> None:
        self.max_abs, self.largest = 0.0, 0.0
        self.apart, self.power = 0.0, 0.0  # sums of squares
        self.hits, self.judged, self.samples = 0, 0, 0

    def add(self, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
        """Add one batch's outputs of torch and of the runtime. RefusedError if their shapes differ."""
        if [a.shape for a in ours] != [b.shape for b in theirs]:
            raise RefusedError(
                f"compare: torch gives outputs of {[list(a.shape) for a in ours]}, "
                f"the runtime of {[list(b.shape) for b in theirs]}."
            )
        for a, b in zip(ours, theirs, strict=True):
            if not a.size:
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(invalid="ignore"):
                apart = np.abs(a - b)
            apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0  # equal infinities have no distance
            self.max_abs = max(self.max_abs, float(np.where(np.isnan(apart), np.inf, apart).max()))
            self.apart += float(np.square(apart).sum())
            finite = a[np.isfinite(a)]
            self.power += float(np.square(finite).sum())
            self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
        first, other = ours[0], theirs[0]
        if first.ndim:
            self.samples += len(first)
        if first.ndim >= 2 and first.shape[1] > 1 and len(first):
            same = (first.argmax(1) == other.argmax(1)).reshape(len(first), -1)  # [B, positions]
            self.hits += int(same.sum())
            self.judged += same.size

    def result(self) -> Difference:
        """The difference over all batches. RefusedError if there was none."""
        if not self.samples:
            raise RefusedError("compare: no batch to compare on.")
        relative = self.max_abs / self.largest if self.largest else (0.0 if self.max_abs == 0 else np.inf)
        agree = self.hits / self.judged if self.judged else None
        rms = math.sqrt(self.apart / self.power) if self.power else (0.0 if self.apart == 0 else math.inf)
        return Difference(self.max_abs, float(relative), rms, agree, self.samples)


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
    batches at once. RefusedError if the outputs differ by more than `tolerance`, relative to the largest
    output; if edges have grids, by more than INTEGERS or the rounding. None allows any difference.
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
    apart, of = difference.max_rel, "the largest"
    if rounded:
        apart, of = difference.rms_rel, "their size (root mean square)"
        tolerance = max(INTEGERS, rounding.result().rms_rel)
    if not apart <= tolerance:
        raise RefusedError(
            f"{runtime}: {path.name} does not compute what {name_of(model)} does: they differ by "
            f"{difference.max_abs:.3g}, {apart:.3g} of {of}; allowed: {tolerance:.3g}."
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
