"""Metric: how good a model is on a set: what is taken down of each sample, and what is made of all of it.

one number a sample       value = their mean                      accuracy
S numbers a sample        value = f(their sums over the set)      mean IoU, F1, perplexity, a correlation
an object a sample        value = f(the list of them)             mAP: detections of a set are ranked together
Kept by sample, two models compare in pairs, whichever of the three it is.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersor.errors import TaskError, did_you_mean
from tersor.model.batches import shapes
from tersor.model.logits import KINDS
from tersor.model.outputs import changed

if TYPE_CHECKING:
    from typing_extensions import TypeIs

BETTER = ("higher", "lower")
LISTED = 200  # resamples of a set of objects: each of them computes the value anew

Scores = Tensor | list[Any]  # [N] or [N, S], or N objects


@dataclass(frozen=True, eq=False)
class Metric:
    """How good a model is on a set of samples, in whatever unit."""

    name: str  # in reports
    _: KW_ONLY
    # (output, target) -> of each sample one number [B], or with `value` numbers [B, S] or a list of B objects
    statistics: Callable[[Any, Any], Any]
    value: Callable[[Any], Any] | None = None  # of the sums [S], float64, or of the list of all objects
    better: str = "higher"  # or "lower", as of a perplexity
    percent: bool = False  # its value is a share: shown in percent, and drops in points
    kind: str | None = None  # statistics sees logits of that kind, classes on axis 1; None: the raw output
    resamples: int | None = None  # of the bootstrap; 10,000 of sums and 200 of lists where it is None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TaskError(f"metric: name={self.name!r}, but it is a word for reports")
        who = f"metric {self.name!r}"
        if not callable(self.statistics):
            raise TaskError(f"{who}: statistics={self.statistics!r}, but it is a function, {STATISTICS}")
        if self.value is not None and not callable(self.value):
            raise TaskError(f"{who}: value={self.value!r}, but it is a function, value(sums [S]) -> a number")
        if self.better not in BETTER:
            raise TaskError(f"{who}: better={self.better!r}; {did_you_mean(self.better, BETTER)}")
        if self.kind is not None and self.kind not in KINDS:
            raise TaskError(f"{who}: kind={self.kind!r}; {did_you_mean(self.kind, KINDS)}")
        if self.resamples is not None and (type(self.resamples) is not int or self.resamples < 1):
            raise TaskError(f"{who}: resamples={self.resamples!r}, but it is a count: 1 or more")

    @property
    def unit(self) -> str:
        """Of drops: "points", or nothing where it is the metric's own."""
        return "points" if self.percent else ""

    @property
    def sign(self) -> int:
        """1 where a higher value is better, else -1."""
        return 1 if self.better == "higher" else -1

    def of(self, scores: Scores) -> float:
        """The value of a whole set: scores are as `Task.scores` gives them."""
        if self.value is None:
            return float(torch.as_tensor(scores).double().mean())
        return self.number(scores if isinstance(scores, list) else scores.double().sum(0))

    def number(self, statistics: Any) -> float:
        """`value` as a plain number."""
        found = self.value(statistics) if self.value is not None else statistics
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            raise TaskError(
                f"metric {self.name!r}: its value is {shapes(found)}, but it is one number"
            ) from None

    def checked(self, found: Any, count: int | None, fit: str) -> Scores:
        """What `statistics` gave of a batch of `count` samples, on the CPU; TaskError where it is not so."""
        b = "B" if count is None else str(count)
        gave, who = f"the metric gave {shapes(found)}", f"metric {self.name!r}"
        if isinstance(found, list) and self.value is not None:
            if count not in (None, len(found)):
                raise TaskError(f"{who}: {gave}, but a list has one object a sample, {b}; {fit}.")
            return [changed(item, lambda tensor: tensor.detach().cpu()) for item in found]
        wide = 1 if self.value is None else 2
        if not isinstance(found, Tensor) or found.ndim != wide or count not in (None, len(found)):
            wanted = f"one score a sample, [{b}]" if wide == 1 else f"statistics of each sample, [{b}, S]"
            other = "" if wide == 2 else ". What is of a whole set is a tersor.Metric(statistics=, value=)"
            raise TaskError(f"{who}: {gave}, but it gives {wanted}; {fit}{other}.")
        if not torch.isfinite(found).all():
            raise TaskError(f"{who}: the metric gave scores that are not finite; {fit}.")
        return found.detach().cpu().float() if wide == 1 else found.detach().cpu().double()


STATISTICS = "statistics(output, target) -> of each sample [B], [B, S], or a list of B"


def counts_up(given: Any) -> TypeIs[nn.Module]:
    """Whether it is an object of torchmetrics, or one that works alike."""
    return isinstance(given, nn.Module) and all(
        callable(getattr(given, word, None)) for word in ("update", "compute", "reset")
    )


def counted(given: Any) -> Metric:
    """An object of torchmetrics as a metric: what it is shown is kept by sample, and computed at the end.

    Detectors' outputs and targets are lists with an item for each sample; others are tensors of samples."""
    name = type(given).__name__
    if isinstance(given, nn.ModuleDict):  # MetricCollection
        raise TaskError(f"metric: {name} has several metrics, and a task one. Give one of {', '.join(given)}")
    higher = getattr(given, "higher_is_better", None)
    if higher is None:
        raise TaskError(
            f"metric: {name} does not say whether higher is better. Give tersor.Metric({name!r}, "
            "statistics=..., value=..., better=...)"
        )

    def statistics(output: Any, target: Any) -> list[Any]:
        if isinstance(output, (Tensor, list)) and isinstance(target, (Tensor, list)):
            return list(zip(output, target, strict=True))
        raise TaskError(
            f"metric {name!r}: it is shown tensors or lists with an item for each sample, not "
            f"{shapes(output)} and {shapes(target)}. Give tersor.Metric({name!r}, statistics=..., value=...)"
        )

    def value(samples: list[Any]) -> Any:
        metric = copy.deepcopy(given).cpu()
        metric.reset()
        for _, alike in itertools.groupby(samples, sizes):  # batches may be padded to lengths of their own
            part = list(alike)
            metric.update(*(joined([sample[side] for sample in part]) for side in (0, 1)))
        found = metric.compute()
        return found["map"] if isinstance(found, dict) and "map" in found else found

    return Metric(name, statistics=statistics, value=value, better="higher" if higher else "lower")


def sizes(sample: tuple[Any, Any]) -> list[Any]:
    return [side.shape if isinstance(side, Tensor) else None for side in sample]


def joined(samples: list[Any]) -> Any:
    return torch.stack(samples) if isinstance(samples[0], Tensor) else samples
