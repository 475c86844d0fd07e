"""Task: what a model is for: the batches that calibrate, train and evaluate it, its loss and its metric.

score[n] = metric(model(input[n]), target[n])      kept for each sample, to compare two models in pairs
A batch is (input..., target) or {"labels": target, name: input, ...}; `feed` and `target` override both. Loss
and metric get the model's raw output; `logits` selects the tensor of it that is compared with a teacher's.
Cost: `scores` is one pass over the evaluation set, `check` a batch or two, `digest` eight batches.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tersor.boundary import no_memory
from tersor.errors import TaskError, did_you_mean, need
from tersor.model.batches import (
    MISFIT,
    Again,
    device_of,
    evaluating,
    fits,
    hash_batch,
    length_of,
    misfit_set,
    move,
    shapes,
    steady,
)
from tersor.model.builtin_metrics import metric_of
from tersor.model.calibration import Sound, Told
from tersor.model.fast_path import no_fast_path
from tersor.model.frozen import as_trained
from tersor.model.logits import KINDS, Given, Logits, logits_of
from tersor.model.losses import batch_loss, default_loss, soft_loss, takes_labels
from tersor.model.metric import Metric
from tersor.model.needs import Needs
from tersor.model.outputs import as_floats, own_loss
from tersor.model.scoring import score
from tersor.model.task_check import check_answer, check_loss, hint

SETS = ("evaluate", "calibrate", "train")
LABELS = ("labels", "label")
DIGEST_BATCHES = 4

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """What a model is for. A set of batches is a DataLoader, a list, or a function giving an iterator."""

    name: str = "task"
    _: KW_ONLY
    evaluate: Batches  # scored: accuracy, drops and p-values are computed on these
    calibrate: Batches | None = None  # a few batches for ranges and statistics; targets not needed
    train: Batches | None = None  # batches of one epoch
    loss: Callable[[Any, Any], Tensor] = default_loss  # (output, target) -> scalar, smaller is better
    metric: str | Metric | Callable[[Any, Any], Any] = "accuracy"  # (output, target) -> [B], larger is better
    logits: Given = None  # output -> Logits, a tensor, or a tuple of them; or a kind; None: automatic
    feed: Callable[[nn.Module, Any], Any] | None = None  # (model, batch) -> output
    target: Callable[[Any], Any] | None = None  # batch -> target
    fingerprint: str | None = None  # a string that changes when the data does; None: batches are hashed
    example: Any = None  # inputs for export: a tuple, a dict by name, or one tensor
    part: str | tuple[str, ...] | None = None  # modules that are traced in place of the model: model/part.py

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
        _ = self.scored  # checks the metric now
        for word, signature in SIGNATURES.items():
            function = getattr(self, word)
            if not callable(function) and not (word in ("feed", "target") and function is None):
                raise TaskError(f"{self._who}: {word}={function!r}, but it is a function, {signature}")
        if self.logits is not None and self.logits not in KINDS and not callable(self.logits):
            raise TaskError(
                f"{self._who}: logits={self.logits!r}, but it is a function of the output, or a kind. "
                f"{did_you_mean(str(self.logits), KINDS)}"
            )
        if self.fingerprint is not None and (not isinstance(self.fingerprint, str) or not self.fingerprint):
            raise TaskError(
                f"{self._who}: fingerprint={self.fingerprint!r}, but it is a string, such as a checksum"
            )
        odd = [name for name in self.parts if not isinstance(name, str) or not name]
        if odd or len({*self.parts}) < len(self.parts) or (self.part is not None and not self.parts):
            raise TaskError(
                f"{self._who}: part={self.part!r}, but it is the path of a module, such as 'backbone', or a "
                f"tuple of several"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths of the modules that are traced in place of the model; none: the model is."""
        if isinstance(self.part, (tuple, list)):
            return tuple(self.part)
        return () if self.part is None else (self.part,)

    def in_part(self, name: str) -> bool:
        """Whether a module, weight or edge is inside of a part, by its name; yes for a task without parts."""
        return not self.parts or within(self.parts, name)

    @property
    def _who(self) -> str:
        return f"task {self.name!r}"

    @cached_property
    def scored(self) -> Metric:
        """`metric` as a Metric."""
        return metric_of(self.metric, self._who)

    def __repr__(self) -> str:
        given = ", ".join(
            f"{word}={_count(getattr(self, word))}" for word in SETS if getattr(self, word) is not None
        )
        return f"Task({self.name!r}, {given}, metric={self.scored.name})"

    def batches(self, word: str) -> Iterable[Any]:
        """The batches of a set, "evaluate", "calibrate" or "train", for any number of passes.

        DataLoaders are returned unwrapped (Accelerate shards them). TaskError if there are no batches.
        """
        if word not in SETS:
            raise TaskError(f"{self._who}: no set {word!r}; {did_you_mean(word, SETS)}")
        source = getattr(self, word)
        if source is None:
            raise TaskError(
                f"{self._who}: this needs {word} batches, and the task has none. Give Task(..., {word}=...): "
                "a DataLoader, a list of batches, or a function that returns an iterator."
            )
        empty = TaskError(f"{self._who}: the {word} set is empty: it returned no batch.")
        if length_of(source) == 0:
            raise empty
        # Accelerate shards DataLoaders only, so one that trains is never wrapped.
        as_is = isinstance(source, DataLoader) and (word == "train" or length_of(source) is not None)
        found = source if as_is else Again(source, empty)
        if word != "calibrate":
            return found
        return Told(found) if self.feed is not None else Sound(Told(found), self.inputs, self._who)

    def inputs(self, batch: Any) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments, (args, kwargs), for a task without `feed`."""
        if isinstance(batch, Mapping):
            return (), {str(key): item for key, item in batch.items() if key not in LABELS}
        if isinstance(batch, (tuple, list)) and len(batch) > 0:
            return (tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)), {}
        if isinstance(batch, Tensor):
            return (batch,), {}  # calibration needs no targets
        raise TaskError(
            f"{self._who}: a batch is {shapes(batch)}, but it is a tuple (input..., target) or a dict with "
            "'labels'. For other batches give feed=(model, batch) -> output and target=(batch) -> target."
        )

    @no_fast_path()
    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's raw output for a batch, in the model's present mode and on its device.

        With the default loss, a model whose forward takes `labels` (Hugging Face) gets those of the batch: it
        computes its own loss from them, and some models compute the decoder's inputs from them.
        """
        if self.feed is not None:
            return self.feed(model, batch)
        args, kwargs = self.inputs(batch)
        if self.loss is default_loss and self.target is None and isinstance(batch, Mapping):
            labels = next((batch[key] for key in LABELS if key in batch), None)
            kwargs |= {"labels": labels} if labels is not None and takes_labels(model) else {}
        return model(*args, **kwargs)

    def target_of(self, batch: Any) -> Any:
        """The target of a batch: from `target`, else the last of a tuple, or "labels" or "label"."""
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

    def maybe_target(self, batch: Any) -> Any:
        """The target of a batch, None if it has none: comparing with a teacher needs no targets."""
        try:
            return self.target_of(batch)
        except (*MISFIT, TaskError):
            return None

    def logits_of(self, output: Any, target: Any = None, kind: str | None = None) -> tuple[Logits, ...]:
        """The logits of an output, mostly one tensor: from the task's `logits`, else of the given kind, else
        found automatically. TaskError if they are ambiguous."""
        given = self.logits if self.logits is not None else kind
        return fits(
            lambda: logits_of(output, given, target, self._who),
            f"{self._who}: logits= does not fit: output {shapes(output)}",
        )

    def scores(
        self, model: nn.Module, watch: Callable[[int, int | None], None] | None = None,
        see: Callable[[Any, Any], None] | None = None,
    ) -> Any:  # fmt: skip
        """The metric's statistics of each evaluation sample, on the CPU, in a fixed order: [N] float32, or
        for a metric of the whole set [N, S] or a list; `scored.of` computes the value from them.

        The model runs in eval mode without gradients on its own device; its modes and all random state are
        left as they were. `watch(done, total)` is called after each batch; total is None if unknown.
        `see(output, batch)` gets the raw output of each batch.
        """
        self._check_model(model)
        batches = self.batches("evaluate")
        total, device = length_of(batches), device_of(model)
        found: list[Any] = []
        with evaluating(model), steady(self.evaluate):
            for done, batch in enumerate(batches, 1):
                here = move(batch, device)
                output = self.answer(model, here)
                if see is not None:
                    see(output, here)
                found.append(self._score(output, here))
                if watch is not None:
                    watch(done, total)
        if isinstance(found[0], list):
            return [sample for batch_of in found for sample in batch_of]
        return torch.cat(found)  # [N], [N, S]

    def loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss of a raw output: the task's, else the model's own if it computed one, else the default
        loss of the logits, without padding."""
        if self.loss is not default_loss:
            return self.loss(output, self.target_of(batch))
        if (own := own_loss(output)) is not None:
            return own
        found = self.logits_of(output, target := self.target_of(batch))
        return batch_loss(found, target, output, batch)

    def soft_loss(self, output: Any, wanted: Any, batch: Any, temperature: float) -> Tensor:
        """The distillation loss of a raw output and the teacher's, without padding. Needs no targets."""
        target = self.maybe_target(batch)
        mine, theirs = self.logits_of(output, target), self.logits_of(wanted, target)
        return soft_loss(mine, theirs, target, output, batch, temperature=temperature)

    def check(self, model: nn.Module, needs: Needs | None = None) -> None:
        """TaskError if the task does not fit the model: it must run, and for SCORES, LOSS and SOFT the
        metric, the loss and the logits must accept its output. Each is tried in the mode and on a batch of
        the set that it is used with; training on a copy. None: SCORES, and LOSS if `train` is given.
        MissingError if TRAINING lacks its package."""
        self._check_model(model)
        if needs is not None and Needs.TRAINING in needs and find_spec("accelerate") is None:
            raise need("accelerate", "train", "training")
        if needs is None:
            needs = Needs.SCORES | (Needs.NOTHING if self.train is None else Needs.LOSS)
        word = "evaluate" if Needs.SCORES in needs else self.shown
        with evaluating(model), steady(getattr(self, word)):
            batch = move(next(iter(self.batches(word))), device_of(model))
            output = self.answer(model, batch)
            check_answer(self._who, model, batch, output)
            if Needs.SCORES in needs:
                self._score(output, batch)
        if not needs & (Needs.LOSS | Needs.SOFT):
            return
        copied = as_trained(copy.deepcopy(model))
        with steady(self.train), torch.enable_grad():
            batch = move(next(iter(self.batches("train"))), device_of(model))
            output = as_floats(self.answer(copied, batch))
            fit = f"output {shapes(output)}, target {shapes(self.maybe_target(batch))}"
            if Needs.LOSS in needs:
                message = f"{self._who}: the loss does not fit: {fit}"
                check_loss(self._who, model, fits(lambda: self.loss_of(output, batch), message), fit)
            if Needs.SOFT in needs:
                with evaluating(copied):  # a teacher runs in eval mode
                    wanted = as_floats(self.answer(copied, batch))
                message = f"{self._who}: the logits for a teacher do not fit: {fit}"
                fits(lambda: self.soft_loss(output, wanted, batch, 1.0), message)

    def digest(self) -> str:
        """A fingerprint of the data: the given one, else the SHA-256 (hex) of lengths and first batches.

        The hash covers the first four evaluation and calibration batches, and the number of batches of every
        set if it is known. TaskError if a batch holds an object that cannot be hashed.
        """
        if self.fingerprint is not None:
            return self.fingerprint
        total = hashlib.sha256()
        for word in SETS:
            source = getattr(self, word)
            total.update(f"{word} {None if source is None else _count(source)};".encode())
            if source is not None and word != "train":  # random augmentation may change training batches
                with steady(source):
                    for _, batch in zip(range(DIGEST_BATCHES), self.batches(word), strict=False):
                        hash_batch(total, batch)
        return total.hexdigest()

    @property
    def shown(self) -> str:
        """The set whose first batches are used for traces and checks: "calibrate", else "evaluate"."""
        return "evaluate" if self.calibrate is None else "calibrate"

    def _check_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"{self._who}: the model is a {type(model).__name__}, but it is a torch.nn.Module."
            )

    def answer(self, model: nn.Module, batch: Any) -> Any:
        """`run`, with a TaskError if the batch does not fit the model."""
        try:
            return self.run(model, batch)
        except MISFIT as error:
            if no_memory(error):
                raise
            raise TaskError(
                f"{self._who}: batches do not fit the model {type(model).__name__}: a batch is "
                f"{shapes(batch)}. {type(error).__name__}: {error}{hint(model, batch)}"
            ) from error

    def _score(self, output: Any, batch: Any) -> Any:
        return score(self.scored, output, self.target_of(batch), self.logits, self._who, batch=batch)


SIGNATURES = {
    "loss": "loss(output, target) -> scalar",
    "feed": "feed(model, batch) -> output",
    "target": "target(batch) -> target",
}


def within(parts: tuple[str, ...], name: str) -> bool:
    return any(name == part or name.startswith((f"{part}.", f"{part}/")) for part in parts)


def _count(batches: Any) -> str:
    length = length_of(batches)
    return "? batches" if length is None else f"{length} batches"
