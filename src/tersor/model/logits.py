"""Logits: the tensor of an output that distillation and the default loss compare, and its kind.

classes      scores of K classes along an axis     integer targets of the same shape without that axis
binary       a score for each yes or no            boolean targets of the same shape
regression   numbers themselves                    embedding   vectors, whose axis is the last one
Tensor, kind and axis are found automatically if there is only one possibility, else refused: training with a
softmax over the wrong axis learns nothing, without an error. `.logits` is the name of the class scores in
Hugging Face's models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TaskError, did_you_mean
from tersor.model.batches import shapes
from tersor.model.outputs import part, parts_of, tensors_of

KINDS = ("classes", "binary", "regression", "embedding")
IGNORED = -100  # a target that does not count: the default ignore_index of torch's cross entropy
VECTORS = "last_hidden_state"  # the name of the vectors in Hugging Face's encoders
WAY_OUT = (
    "Set it with Task(logits=...): a function of the output that returns tersor.Logits(tensor, kind, axis), "
    "or a tuple of them; or only a kind, one of classes, binary, regression, embedding"
)


@dataclass(frozen=True, eq=False)
class Logits:
    """The tensor that is compared, and its `kind`: one of classes, binary, regression, embedding."""

    tensor: Tensor  # of floats, [B, ...]
    kind: str
    axis: int = 1  # of the classes; not used by the other kinds

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or not self.tensor.is_floating_point():
            raise TaskError(f"logits: {shapes(self.tensor)}, but they must be a tensor of floats")
        if self.kind not in KINDS:
            raise TaskError(f"logits: kind={self.kind!r}; {did_you_mean(self.kind, KINDS)}")
        if self.kind == "classes":
            ndim = self.tensor.ndim
            if not -ndim <= self.axis < ndim or self.axis % ndim == 0:
                raise TaskError(
                    f"logits: axis={self.axis} of {shapes(self.tensor)}, but it must be the class axis; "
                    f"axis 0 holds the samples"
                )
            if self.scores.shape[1] == 1:
                raise TaskError(
                    f"logits: {shapes(self.tensor)} has one class, and a classifier needs two or more. Is it "
                    f"binary, or regression? {WAY_OUT}"
                )

    @property
    def scores(self) -> Tensor:
        """The tensor with the classes on axis 1, as torch's losses expect it."""
        return self.tensor.movedim(self.axis, 1) if self.kind == "classes" else self.tensor

    @property
    def places(self) -> tuple[int, ...]:
        """The shape of the positions that a loss averages over: without the classes, or the last axis."""
        shape = self.scores.shape
        return (shape[0], *shape[2:]) if self.kind == "classes" else tuple(shape[:-1])


Given = str | Callable[[Any], Any] | None  # a task's logits=: a kind, a function of the output, or None


def logits_of(output: Any, given: Given, target: Any, who: str) -> tuple[Logits, ...]:
    """The logits of an output, mostly one. `target` determines kind and axis if nothing else does."""
    if not callable(given):
        found, named = compared(output, given, who)
        return (with_kind(found, given, target, named, who),)
    found = given(output)
    several = isinstance(found, (tuple, list))
    parts = list(found) if several else [found]
    if not parts:
        raise TaskError(f"{who}: logits= returned nothing. {WAY_OUT}")
    targets = targets_of(target, len(parts)) if several else [target]
    return tuple(
        item if isinstance(item, Logits) else with_kind(item, None, goal, False, who)
        for item, goal in zip(parts, targets, strict=True)
    )


def targets_of(target: Any, count: int) -> list[Any]:
    """A target for each of `count` logits; None for each if the target is not a sequence of `count`."""
    one_each = isinstance(target, (tuple, list)) and len(target) == count
    return list(target) if one_each else [target] if count == 1 else [None] * count


def compared(output: Any, kind: str | None, who: str) -> tuple[Any, bool]:
    """(the tensor of an output that is compared, whether it is named `logits` and so holds class scores)."""
    if isinstance(output, Tensor):
        return output, False
    if isinstance(named := part(output, "logits"), Tensor):
        return named, True
    if kind is not None and isinstance(vectors := part(output, VECTORS), Tensor):
        return vectors, False
    floats = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    if len(floats) == 1 and parts_of(output):
        return floats[0], False
    raise TaskError(
        f"{who}: the output is {shapes(output)}, and it is ambiguous which tensor to compare. {WAY_OUT}, "
        f"such as logits=lambda output: tersor.Logits(output[0], 'classes')."
    )


def first_tensor(output: Any, given: Given) -> Tensor | None:
    """The first floating tensor that would be compared, of any kind; None if there is none."""
    found = given(output) if callable(given) else next(
        (item for name in ("logits", VECTORS) if isinstance(item := part(output, name), Tensor)), output
    )  # fmt: skip
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    found = found.tensor if isinstance(found, Logits) else found
    return next((t for t in tensors_of(found) if t.is_floating_point() and t.ndim), None)


def with_kind(tensor: Any, kind: str | None, target: Any, named: bool, who: str) -> Logits:
    """A tensor as Logits. Without `kind`, target and name determine it; TaskError if they do not."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim == 0:
        raise TaskError(f"{who}: logits are {shapes(tensor)}, but must be a tensor of floats, [B, ...]")
    if kind in ("binary", "regression", "embedding"):
        return Logits(tensor, kind)
    axes = class_axes(tensor, target)
    usual = (1 if tensor.ndim in (2, 4, 5) else tensor.ndim - 1) if named and tensor.ndim > 1 else None
    if usual in axes or not axes and not same_shape(tensor, target):
        axes = [usual] if usual is not None else axes
    if kind == "classes" and not axes and tensor.ndim == 2:
        axes = [1]
    if len(axes) == 1:
        return Logits(tensor, "classes", axes[0])
    if same_shape(tensor, target) and target.dtype == torch.bool:
        return Logits(tensor, "binary")
    fit = f"output {shapes(tensor)}" + ("" if target is None else f", target {shapes(target)}")
    why = f"the classes may be axis {axes[0]} or {axes[1]}" if axes else "the kind of its numbers is unknown"
    raise TaskError(f"{who}: {why}: {fit}. {WAY_OUT}.")


def class_axes(tensor: Tensor, target: Any) -> list[int]:
    """The axes that may hold the classes: 1 or the last, if the shape without it is an integer target's."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        return []
    shape = tuple(tensor.shape)
    axes = dict.fromkeys((1, tensor.ndim - 1)) if tensor.ndim > 1 else ()
    return [axis for axis in axes if shape[:axis] + shape[axis + 1 :] == tuple(target.shape)]


def same_shape(tensor: Tensor, target: Any) -> bool:
    return isinstance(target, Tensor) and target.shape == tensor.shape


def not_padding(logits: Logits, output: Any, batch: Any) -> Tensor | None:
    """Which positions are not padding, by the batch's attention mask: bool of the shape of `places`.

    None if the mask has another shape. For an encoder-decoder it is the decoder's mask.
    """
    if len(logits.places) < 2:
        return None
    return unpadded(batch, logits.places, logits.tensor.device, decoder=is_encoder_decoder(output, batch))


def is_encoder_decoder(output: Any, batch: Any) -> bool:
    """Whether a model is an encoder-decoder, by the names in its batch and its output."""
    given = isinstance(batch, Mapping) and any(str(key).startswith("decoder_") for key in batch)
    return given or part(output, "encoder_last_hidden_state") is not None


def unpadded(batch: Any, shape: tuple[int, ...], device: torch.device, *, decoder: bool) -> Tensor | None:
    """Which positions of a shape are not padding, bool; None if the batch has no mask of that shape."""
    name = "decoder_attention_mask" if decoder else "attention_mask"
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.to(device) != 0 if isinstance(mask, Tensor) and tuple(mask.shape) == shape else None


def not_ignored(logits: Logits, target: Any) -> Tensor | None:
    """Which positions of class scores have a target other than -100, bool; None if no integer target of the
    shape `places` is given."""
    if logits.kind != "classes" or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    return target != IGNORED if tuple(target.shape) == logits.places else None
