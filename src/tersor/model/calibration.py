"""Calibration: whether the inputs in a pass over the calibration batches can be those of a working model.

damaged   max_n m_n > far * median_n m_n, m_n = max |x_n|   one number of uninitialized memory, say
blank     all numbers of all inputs, floats, are the same   no grid spans what the model is meant for
Ranges, means and least squares would follow the one damaged number, and the model be destroyed for all other
inputs. Each argument of the model is judged alone. NaN, infinities and values of an attention mask are no
matter of this file: steps name them, or leave them out, where they meet them.
Cost: the largest magnitude of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from tersor.errors import TaskError
from tersor.model.batches import length_of
from tersor.model.edge_values import least_unmasked

FAR = 1e6  # beyond, refitted weights serve the one sample alone
FAR_ON_GRIDS = 1e5  # a grid has 256 steps

Watch = Callable[[int, int | None], None]  # (number of a batch in its pass, how many there are if known)
WATCH: ContextVar[Watch | None] = ContextVar("calibration batches", default=None)


class Argument:
    """The largest magnitude of each sample of an argument, and its least and greatest number."""

    def __init__(self) -> None:
        self.sizes: list[Tensor] = []
        self.low, self.high, self.count = torch.inf, -torch.inf, 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(len(x) if x.ndim > 1 else x.numel(), -1).float()
        finite = rows.isfinite() & (rows > least_unmasked(x.dtype))
        self.sizes.append(rows.masked_fill(~finite, 0).abs().amax(1).cpu())
        if finite.any():
            self.low = min(self.low, float(rows[finite].min()))
            self.high = max(self.high, float(rows[finite].max()))
        self.count += x.numel()


class Seen:
    """The float inputs of a pass. `inputs` gives the arguments of the model for a batch."""

    def __init__(self, inputs: Callable[[Any], Any], who: str):
        self.inputs, self.who = inputs, who
        self.arguments: dict[str, Argument] = {}
        self.tokens = False  # whether an argument holds integers, which floats of ones often go with: a mask

    def add(self, batch: Any) -> None:
        for path, x in tree_flatten_with_path(self.inputs(batch))[0]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                self.arguments.setdefault(str(path), Argument()).add(x)
            self.tokens |= isinstance(x, Tensor) and not x.is_floating_point()

    def refuse_damaged(self, far: float = FAR) -> None:
        for each in self.arguments.values():
            sizes = torch.cat(each.sizes)
            usual, largest = float(sizes.median()), float(sizes.max())
            if usual and largest > far * usual:
                raise TaskError(
                    f"{self.who}: sample {int(sizes.argmax())} of the calibration batches holds a number of "
                    f"{largest:.3g}, and half of the samples none above {usual:.3g}. Ranges and refits would "
                    "follow it alone. It is damaged, or of another unit: leave it out, or scale the inputs."
                )

    def refuse_blank(self) -> None:
        seen = self.arguments.values()
        if seen and not self.tokens and all(each.low == each.high and each.count > 1 for each in seen):
            raise TaskError(
                f"{self.who}: all numbers in the calibration batches are {next(iter(seen)).low:.6g}, so they "
                "show no range. Give samples that the model is meant for, or activation_range=dynamic."
            )


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """`watch` is told of each calibration batch before it is used: a step may take minutes for its passes."""
    token = WATCH.set(watch)
    try:
        yield
    finally:
        WATCH.reset(token)


class Told:
    """Batches that are told to the one who watches."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        total = length_of(self.batches)
        for number, batch in enumerate(self.batches, 1):
            if (watch := WATCH.get()) is not None:
                watch(number, total)
            yield batch


class Sound:
    """Batches whose inputs are looked at in each pass. TaskError after the last one if one is damaged."""

    def __init__(self, batches: Iterable[Any], inputs: Callable[[Any], Any], who: str):
        self.batches, self.inputs, self.who = batches, inputs, who

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        seen = Seen(self.inputs, self.who)
        for batch in self.batches:
            yield batch
            seen.add(batch)
        seen.refuse_damaged()
