"""Task: what a model is for: the batches that calibrate, train and evaluate it, its loss and its metric.

score[n] = metric(model(input[n]), target[n])      one number a sample, so that two models compare in pairs
A batch is (input..., target) or {"labels": target, name: input, ...}; `feed` and `target` overrule both.
Cost: `scores` is one pass over the evaluation set, `check` one batch, `digest` eight batches.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tersor.errors import TaskError, did_you_mean
from tersor.model.batches import (
    Again,
    device_of,
    evaluating,
    hash_batch,
    length_of,
    misfit_set,
    move,
    shapes,
    steady,
)
from tersor.model.metric import METRICS

SETS = ("evaluate", "calibrate", "train")
LABELS = ("labels", "label")
DIGEST_BATCHES = 4
# What a model, loss or metric raises when it is fed something that does not fit it.
MISFIT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """What a model is for. A set of batches is a DataLoader, a list, or a function giving an iterator."""

    name: str = "task"
    _: KW_ONLY
    evaluate: Batches  # scored: what accuracy, drops and p-values are about
    calibrate: Batches | None = None  # a few batches for ranges and statistics; targets not needed
    train: Batches | None = None  # batches of one epoch
    loss: Callable[[Any, Any], Tensor] = cross_entropy  # (output, target) -> scalar, smaller is better
    metric: str | Callable[[Any, Any], Tensor] = "accuracy"  # (output, target) -> [B], larger is better
    feed: Callable[[nn.Module, Any], Any] | None = None  # (model, batch) -> output
    target: Callable[[Any], Any] | None = None  # batch -> target
    fingerprint: str | None = None  # a text that changes when the data does; without it, batches are hashed
    example: Any = None  # inputs for export: a tuple, a dict by name, or one tensor

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TaskError(f"task: name={self.name!r}, but it is a word for reports")
        for word in SETS:
            batches = getattr(self, word)
            if batches is None and word != "evaluate":
                continue
            bare = word == "calibrate" or self.target is not None
            if wrong := misfit_set(word, batches, bare):
                raise TaskError(f"{self._who}: {word}= {wrong}")
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise TaskError(
                f"{self._who}: metric={self.metric!r}; {did_you_mean(self.metric, METRICS)}, or a function"
            )
        functions = {"loss": self.loss, "feed": self.feed, "target": self.target, "metric": self._metric}
        for word, function in functions.items():
            if not callable(function) and not (word in ("feed", "target") and function is None):
                raise TaskError(f"{self._who}: {word}={function!r}, but it is a function, {SIGNATURES[word]}")
        if self.fingerprint is not None and (not isinstance(self.fingerprint, str) or not self.fingerprint):
            raise TaskError(
                f"{self._who}: fingerprint={self.fingerprint!r}, but it is a text, such as a checksum"
            )

    @property
    def _who(self) -> str:
        return f"task {self.name!r}"

    @property
    def _metric(self) -> Callable[[Any, Any], Tensor]:
        return METRICS[self.metric] if isinstance(self.metric, str) else self.metric

    def __repr__(self) -> str:
        given = ", ".join(
            f"{word}={_count(getattr(self, word))}" for word in SETS if getattr(self, word) is not None
        )
        metric = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")
        return f"Task({self.name!r}, {given}, metric={metric})"

    def batches(self, word: str) -> Iterable[Any]:
        """The batches of a set, "evaluate", "calibrate" or "train": iterate as often as wanted.

        DataLoaders come back as themselves (Accelerate shards them). TaskError where there are none.
        """
        if word not in SETS:
            raise TaskError(f"{self._who}: no set {word!r}; {did_you_mean(word, SETS)}")
        source = getattr(self, word)
        if source is None:
            raise TaskError(
                f"{self._who}: this needs {word} batches, and the task has none. Give Task(..., {word}=...): "
                "a DataLoader, a list of batches, or a function that returns an iterator."
            )
        empty = TaskError(f"{self._who}: the {word} set is empty: it gave no batch.")
        if length_of(source) == 0:
            raise empty
        # Accelerate shards DataLoaders only, so one is never wrapped where it trains.
        as_is = isinstance(source, DataLoader) and (word == "train" or length_of(source) is not None)
        return source if as_is else Again(source, empty)

    def inputs(self, batch: Any) -> tuple[tuple, dict[str, Any]]:
        """What the model is called with, (args, kwargs), where no `feed` is given."""
        if isinstance(batch, Mapping):
            return (), {str(key): item for key, item in batch.items() if key not in LABELS}
        if isinstance(batch, (tuple, list)) and len(batch) > 0:
            return (tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)), {}
        if isinstance(batch, Tensor):
            return (batch,), {}  # calibration needs no targets
        raise TaskError(
            f"{self._who}: a batch is {shapes(batch)}, but it is a tuple (input..., target) or a dict with "
            "'labels'. For anything else give feed=(model, batch) -> output and target=(batch) -> target."
        )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch, in the mode and on the device the model is in.

        Outputs that carry `.logits` (Hugging Face) come back as the logits, so that a loss sees a tensor.
        """
        if self.feed is not None:
            return self.feed(model, batch)
        args, kwargs = self.inputs(batch)
        output = model(*args, **kwargs)
        return output.logits if isinstance(getattr(output, "logits", None), Tensor) else output

    def target_of(self, batch: Any) -> Any:
        """The target of a batch: what `target` says, else the last of a tuple, or "labels" or "label"."""
        if self.target is not None:
            return self.target(batch)
        if isinstance(batch, Mapping):
            for key in LABELS:
                if key in batch:
                    return batch[key]
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            return batch[-1]
        raise TaskError(
            f"{self._who}: a batch has no target: it is {shapes(batch)}. Give (input..., target), a dict "
            "with 'labels', or target=(batch) -> target."
        )

    def scores(self, model: nn.Module, watch: Callable[[int, int | None], None] | None = None) -> Tensor:
        """The metric of each evaluation sample, [N] float32 on the CPU, in the same order each time.

        The model runs in eval mode without gradients on its own device; its modes and all random state are
        left as they were. `watch(done, total)` is called after each batch; total is None where unknown.
        """
        self._check_model(model)
        batches = self.batches("evaluate")
        total, device, found = length_of(batches), device_of(model), []
        with evaluating(model), steady(self.evaluate):
            for done, batch in enumerate(batches, 1):
                here = move(batch, device)
                found.append(self._score(self._output(model, here), here).cpu())
                if watch is not None:
                    watch(done, total)
        return torch.cat(found)  # [N]

    def check(self, model: nn.Module) -> None:
        """Run one evaluation batch through model, loss and metric; TaskError says what does not fit."""
        self._check_model(model)
        with evaluating(model), steady(self.evaluate):
            batch = move(next(iter(self.batches("evaluate"))), device_of(model))
            output = self._output(model, batch)
            target = self.target_of(batch)
            fit = f"output {shapes(output)}, target {shapes(target)}"
            loss = _fits(lambda: self.loss(output, target), f"{self._who}: the loss does not fit: {fit}")
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TaskError(
                    f"{self._who}: the loss gave {shapes(loss)}, but it is one number, a scalar tensor."
                )
            if not torch.isfinite(loss).all():
                raise TaskError(
                    f"{self._who}: the loss is {loss.item()} on the first batch ({fit}){_bad_weights(model)}."
                )
            self._score(output, batch)

    def digest(self) -> str:
        """A fingerprint of the data: the given one, else the SHA-256 (hex) of lengths and first batches.

        Hashed are the first four evaluation and calibration batches, and the number of batches of every set
        where it is known. TaskError where a batch holds something without bytes.
        """
        if self.fingerprint is not None:
            return self.fingerprint
        total = hashlib.sha256()
        for word in SETS:
            source = getattr(self, word)
            total.update(f"{word} {None if source is None else _count(source)};".encode())
            if source is None or word == "train":  # training batches may be augmented anew in each pass
                continue
            with steady(source):
                for _, batch in zip(range(DIGEST_BATCHES), self.batches(word), strict=False):
                    hash_batch(total, batch)
        return total.hexdigest()

    @property
    def shown(self) -> str:
        """The set that a model is shown a batch or two of: "calibrate", or "evaluate" where there is none."""
        return "evaluate" if self.calibrate is None else "calibrate"

    def _check_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"{self._who}: the model is a {type(model).__name__}, but it is a torch.nn.Module."
            )

    def _output(self, model: nn.Module, batch: Any) -> Any:
        return _fits(
            lambda: self.run(model, batch),
            f"{self._who}: batches do not fit the model {type(model).__name__}: a batch is {shapes(batch)}",
        )

    def _score(self, output: Any, batch: Any) -> Tensor:
        """One batch's scores, [B] float32, checked."""
        target = self.target_of(batch)
        fit = f"output {shapes(output)}, target {shapes(target)}"
        scores = _fits(lambda: self._metric(output, target), f"{self._who}: the metric does not fit: {fit}")
        count = target.shape[0] if isinstance(target, Tensor) and target.ndim else None
        if not isinstance(scores, Tensor) or scores.ndim != 1 or count not in (None, len(scores)):
            raise TaskError(
                f"{self._who}: the metric gave {shapes(scores)}, but it gives one score a sample, "
                f"[{'B' if count is None else count}]; {fit}."
            )
        if not torch.isfinite(scores).all():
            raise TaskError(f"{self._who}: the metric gave scores that are not finite; {fit}.")
        return scores.detach().float()  # [B]


SIGNATURES = {
    "loss": "loss(output, target) -> scalar",
    "metric": "metric(output, target) -> one score a sample",
    "feed": "feed(model, batch) -> output",
    "target": "target(batch) -> target",
}


def example_inputs(task: Task, model: nn.Module | None = None) -> tuple | dict[str, Any]:
    """Inputs to trace or export a model with: a tuple in order, or a dict by name.

    The task's `example`; else the first calibration (else evaluation) batch. A task that feeds the model its
    own way needs `model`, to see what it is called with; TaskError without it.
    """
    if task.example is not None:
        given = task.example
        if isinstance(given, Mapping):
            return dict(given)
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)
    with steady(getattr(task, task.shown)):
        batch = next(iter(task.batches(task.shown)))
    if task.feed is None:
        args, kwargs = task.inputs(batch)
        return kwargs or args
    if model is None:
        raise TaskError(
            f"task {task.name!r}: it feeds the model its own way; give example=(input, ...) for export."
        )
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with evaluating(model):
            task._output(model, move(batch, device_of(model)))
    finally:
        hook.remove()
    if not seen:
        raise TaskError(
            f"task {task.name!r}: feed= did not call the model; give example=(input, ...) for export."
        )
    args, kwargs = seen[0]
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if args else kwargs


def _fits(call: Callable[[], Result], message: str) -> Result:
    """The call's result; a TaskError with the message and the callee's own words where it fails."""
    try:
        return call()
    except MISFIT as error:
        raise TaskError(f"{message}. {type(error).__name__}: {error}") from error


def _count(batches: Any) -> str:
    length = length_of(batches)
    return "? batches" if length is None else f"{length} batches"


def _bad_weights(model: nn.Module) -> str:
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    return (
        f": these weights are not finite: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}"
        if bad
        else ""
    )
