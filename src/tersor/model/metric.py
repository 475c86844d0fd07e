"""Metric: the quality of a model on a set: statistics of each sample, and one value computed from all.

one number a sample       value = their mean                      accuracy
S numbers a sample        value = f(their sums over the set)      mean IoU, F1, perplexity, a correlation
an object a sample        value = f(the list of them)             mAP: detections of a set are ranked together
Statistics are kept for each sample, so that two models are compared in pairs with all three.
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
LISTED = 200  # bootstrap resamples of lists of objects: each computes the value again, which is slow

Scores = Tensor | list[Any]  # [N] or [N, S], or N objects


@dataclass(frozen=True, eq=False)
class Metric:
    """The quality of a model on a set of samples."""

    name: str  # in reports
    _: KW_ONLY
    # (output, target) -> one number a sample [B], or with `value` S numbers a sample [B, S] or a list of B
    # objects
    statistics: Callable[[Any, Any], Any]
    value: Callable[[Any], Any] | None = None  # f(sums [S], float64), or f(list of all objects)
    better: str = "higher"  # or "lower", as for perplexity
    percent: bool = False  # the value is a fraction: shown in percent, and drops in points
    kind: str | None = None  # statistics gets logits of this kind, classes on axis 1; None: the raw output
    resamples: int | None = None  # bootstrap resamples; None: 10,000 for sums, 200 for lists

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
        """The unit of drops: "points" if `percent`, else ""."""
        return "points" if self.percent else ""

    @property
    def sign(self) -> int:
        """1 if a higher value is better, else -1."""
        return 1 if self.better == "higher" else -1

    def of(self, scores: Scores) -> float:
        """The value of a whole set, from its scores as `Task.scores` returns them."""
        if self.value is None:
            return float(torch.as_tensor(scores).double().mean())
        return self.number(scores if isinstance(scores, list) else scores.double().sum(0))

    def number(self, statistics: Any) -> float:
        """`value` of the statistics as a Python float."""
        found = self.value(statistics) if self.value is not None else statistics
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            raise TaskError(
                f"metric {self.name!r}: its value is {shapes(found)}, but must be one number"
            ) from None

    def checked(self, found: Any, count: int | None, fit: str) -> Scores:
        """What `statistics` returned for a batch of `count` samples, on the CPU. TaskError if it has another
        shape than this metric needs, or is not finite."""
        b = "B" if count is None else str(count)
        got, who = f"the metric returned {shapes(found)}", f"metric {self.name!r}"
        if isinstance(found, list) and self.value is not None:
            if count not in (None, len(found)):
                raise TaskError(f"{who}: {got}, but must return one object a sample, {b}; {fit}.")
            return [changed(item, lambda tensor: tensor.detach().cpu()) for item in found]
        wide = 1 if self.value is None else 2
        if not isinstance(found, Tensor) or found.ndim != wide or count not in (None, len(found)):
            wanted = f"one score a sample, [{b}]" if wide == 1 else f"statistics of each sample, [{b}, S]"
            other = "" if wide == 2 else ". A metric of a whole set is a tersor.Metric(statistics=, value=)"
            raise TaskError(f"{who}: {got}, but must return {wanted}; {fit}{other}.")
        if not torch.isfinite(found).all():
            raise TaskError(f"{who}: the metric returned scores that are not finite; {fit}.")
        return found.detach().cpu().float() if wide == 1 else found.detach().cpu().double()


STATISTICS = "statistics(output, target) -> [B], [B, S], or a list of B, one entry a sample"


def is_torchmetric(given: Any) -> TypeIs[nn.Module]:
    """Whether this is a torchmetrics object, or has the same methods."""
    return isinstance(given, nn.Module) and all(
        callable(getattr(given, word, None)) for word in ("update", "compute", "reset")
    )


def from_torchmetric(given: Any) -> Metric:
    """A torchmetrics object as a Metric: outputs and targets are kept for each sample, and the value is
    computed at the end.

    Detectors' outputs and targets are lists with an item for each sample; others are tensors of samples."""
    name = type(given).__name__
    if isinstance(given, nn.ModuleDict):  # MetricCollection
        raise TaskError(
            f"metric: {name} has several metrics, but a task has one. Give one of {', '.join(given)}"
        )
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
            f"metric {name!r}: it takes tensors or lists with an item for each sample, not "
            f"{shapes(output)} and {shapes(target)}. Give tersor.Metric({name!r}, statistics=..., value=...)"
        )

    def value(samples: list[Any]) -> Any:
        metric = copy.deepcopy(given).cpu()
        metric.reset()
        for _, same_sizes in itertools.groupby(samples, sizes):  # each batch may be padded to another length
            part = list(same_sizes)
            metric.update(*(joined([sample[side] for sample in part]) for side in (0, 1)))
        found = metric.compute()
        return found["map"] if isinstance(found, dict) and "map" in found else found

    return Metric(name, statistics=statistics, value=value, better="higher" if higher else "lower")


def sizes(sample: tuple[Any, Any]) -> list[Any]:
    return [side.shape if isinstance(side, Tensor) else None for side in sample]


def joined(samples: list[Any]) -> Any:
    return torch.stack(samples) if isinstance(samples[0], Tensor) else samples
