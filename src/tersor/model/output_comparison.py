"""Output comparison: how far the outputs of two models differ on a few calibration batches.

Both models run in float64 if they can, also where their code asks for float32 (wide_casts.py), else in
float32, else in their own precision. Outputs are compared element by element, with a tolerance for rounding
that depends on the precision.
Cost: one forward of BATCHES batches for each model and precision.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.maths.units import TINY
from tersor.model.batches import device_of, each, evaluating, move, steady
from tersor.model.counters import unmoved
from tersor.model.outputs import tensors_of
from tersor.model.sites import Site
from tersor.model.task import MISFIT, Task
from tersor.model.wide_casts import WideCasts

BATCHES = 2
# Relative difference that rounding may cause between two models, by precision.
EXACT = {"double": 1e-6, "float": 1e-4, "own": 1e-3}
SHARE = 1e-3  # fraction of a cut's own effect on the output; a larger difference is not rounding
FEW = 0.1  # quantile of a tensor's magnitudes that sets the absolute tolerance for its smallest elements


class Verdict(NamedTuple):
    """How the outputs before and after a change compare with the expected ones."""

    fits: bool  # the new outputs equal the expected ones, everywhere
    moved: bool  # the expected outputs differ from those before the change
    differs: float  # largest absolute difference from the expected outputs
    largest: float  # largest expected magnitude


def verdict(was: list[Tensor], now: list[Tensor], want: list[Tensor], exact: float) -> Verdict:
    """Compare element by element, relative to each magnitude: -1e9 as a fill in one column must not widen the
    tolerance of the others."""
    fits, moved, differs, largest = [a.shape for a in now] == [a.shape for a in want], False, 0.0, 0.0
    for before, after, wanted in zip(was, now, want, strict=False) if fits else ():
        if not wanted.is_floating_point():
            fits = fits and torch.equal(after, wanted)
            moved = moved or not torch.equal(before, wanted)
            continue
        x, y, z = (t.double() for t in (before, after, wanted))
        still = ((x == y) & (y == z)) | (x.isnan() & y.isnan() & z.isnan())  # constants
        x, y, z = x[~still], y[~still], z[~still]
        if not z.numel():
            continue
        if not (x.isfinite() & y.isfinite() & z.isfinite()).all():
            return Verdict(False, moved, math.inf, largest)
        sizes = z.abs()[z != 0]
        floor = exact * float(sizes.kthvalue(max(1, int(FEW * len(sizes)))).values) if len(sizes) else 0.0
        apart, step = (y - z).abs(), (x - z).abs()
        moves = step > exact * (x.abs() + z.abs()) + floor
        if bool(moves.any()):
            moved, floor = True, min(floor, SHARE * float(step[moves].max()))
        fits = fits and bool((apart <= exact * z.abs() + floor + TINY).all())
        differs, largest = max(differs, float(apart.max())), max(largest, float(z.abs().max()))
    return Verdict(fits, moved, differs, largest)


class Squares:
    """The squared difference over the square of the outputs. Of several outputs the mean: places in pixels
    must not outweigh scores."""

    def __init__(self) -> None:
        self.error: dict[int, float] = {}  # of each output
        self.power: dict[int, float] = {}

    def add(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """The outputs for one batch."""
        for k, (x, y) in enumerate(zip(wanted, got, strict=True)):
            if x.is_floating_point():
                self.error[k] = self.error.get(k, 0.0) + float((x - y).double().square().sum())
                self.power[k] = self.power.get(k, 0.0) + float(x.double().square().sum())

    def share(self) -> float:
        """An output of zeros and rounding counts as one that is as small as rounding of the others."""
        least = max(1e-12 * sum(self.power.values()), 1e-300)
        return sum(e / max(self.power[k], least) for k, e in self.error.items()) / max(len(self.error), 1)


def judged(
    before: Callable[[], nn.Module],
    after: Callable[[], nn.Module],
    wanted: Callable[[], nn.Module] | None,
    task: Task,
) -> Verdict:
    """The verdict on a changed model. Each of the first three arguments builds a fresh model. If `wanted` is
    None, the changed model must run, also in training mode, and its outputs must have the same shapes.

    Raises what the models raise, and RefusedError if their outputs cannot be compared."""
    for width in ("double", "float", "own"):
        try:
            was = outputs(before(), task, width)
            break
        except MISFIT:  # its forward uses a fixed dtype
            if width == "own":
                raise
    if width == "own" and not wide_enough(was):
        raise RefusedError(
            "the model runs in 16 bits only, and their rounding hides the effect of a cut. Give it in "
            "float32, model.float(), and let the task's feed and its forward leave dtypes as they are"
        )
    with torch.no_grad():
        try:
            once(task, after().train(), task.shown)
        except MISFIT:
            if trains(before(), task):  # a batch norm refuses a batch of one value, before and after
                raise
    now = outputs(after(), task, width)
    if wanted is None:
        fits = [a.shape for a in now] == [a.shape for a in was]
        return Verdict(fits and all(map(no_new_infinity, was, now)), True, 0.0, 0.0)
    if not was:
        raise RefusedError("the model's output has no tensor to compare")
    found = verdict(was, now, outputs(wanted(), task, width), EXACT[width])
    if found.fits and width != "own":
        want, own = outputs(wanted(), task, "own"), outputs(after(), task, "own")
        fits = [a.dtype for a in own] == [a.dtype for a in want]
        if width == "double" and wide_enough(want):
            fits = fits and verdict(want, own, want, EXACT["own"]).fits
        return found._replace(fits=fits)
    return found


def trains(model: nn.Module, task: Task) -> bool:
    """Whether the model runs in training mode on the task's batches."""
    try:
        once(task, model.train(), task.shown)
    except MISFIT:
        return False
    return True


def no_new_infinity(was: Tensor, now: Tensor) -> bool:
    return bool((now.isfinite() | ~was.isfinite()).all())


def wide_enough(outputs: list[Tensor]) -> bool:
    return all(torch.finfo(a.dtype).bits >= 32 for a in outputs if a.is_floating_point())


def outputs(model: nn.Module, task: Task, width: str) -> list[Tensor]:
    """The output tensors for a few calibration batches (evaluation batches if there are none), with
    parameters and inputs in "double", "float" or the model's "own" precision."""
    model, change = {
        "double": lambda: (model.double(), float_caster(torch.float64)),
        "float": lambda: (model.float(), float_caster(torch.float32)),
        "own": lambda: (model, lambda x: x),
    }[width]()
    word = task.shown
    found: list[Tensor] = []
    with evaluating(model), steady(getattr(task, word)):
        for batch in islice(task.batches(word), BATCHES):
            moved = each(move(batch, device_of(model)), change)
            with WideCasts() if width == "double" else nullcontext():
                found += tensors_of(task.run(model, moved))
    return found


def float_caster(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function that converts float tensors to `dtype` and returns anything else unchanged."""
    return lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def shaken(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Copies of the tensors with random noise on parameters and running statistics, seeded by name. A unit
    that is dead in the given weights is alive in these, so a wrong cut of it changes the output."""
    found = {}
    for name, value in values.items():
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(value.shape, generator=random)
        if value.is_floating_point() and sites[name].kind != "buffer":
            spread = float(value.float().std()) if value.numel() > 1 else 0.0
            begin = 0.0 if name.endswith("bias") else value.float()  # a large bias may silence a unit
            value = (begin + noise * (spread or 0.1)).to(value.dtype)
        elif name.endswith("running_mean"):
            value = (0.1 * noise).to(value.dtype)
        elif name.endswith("running_var"):
            value = (value.float() * noise.exp() + 0.1).to(value.dtype)
        found[name] = value
    return found


def zero(model: nn.Module, tensor: str, axis: int, places: list[int]) -> None:
    """Set these indices along an axis of one of the model's tensors to zero, in place."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        weight = tensors[tensor]
        weight.index_fill_(axis, torch.tensor(places, dtype=torch.int64, device=weight.device), 0)


def once(task: Task, model: nn.Module, word: str, around: AbstractContextManager[Any] | None = None) -> Any:
    """The model's output for the first batch of a set. It runs within `around`; the batch is made before."""
    with steady(loader := getattr(task, word)), unmoved(loader):
        batch = move(next(iter(task.batches(word))), device_of(model))
        with around or nullcontext():
            return task.run(model, batch)
