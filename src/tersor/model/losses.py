"""Losses: the one of the task, the default one, and that of a teacher's soft targets.

soft targets   classes      T^2 * KL(softmax(teacher / T) || softmax(student / T))      Hinton 2015
               binary       T^2 * KL of the chances sigmoid(x / T) and their rest       the same, K = 2
               regression, embedding    mean squared difference                         Romero 2015
T^2 keeps the gradients' size when T changes. Means are over places that count: no padding, no target of -100.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError, TaskError
from tersor.model.batches import shapes
from tersor.model.causal import causal, moved
from tersor.model.logits import IGNORED, Logits, counting, logits_of, marked, targets_of
from tersor.model.outputs import own_loss, part


def default_loss(output: Any, target: Any) -> Tensor:
    """What a task without a loss of its own is trained with: the model's own where it computes one, else
    cross entropy, binary cross entropy or the mean squared error, by what the output is. (In a task it goes
    by the task's logits and the batch's mask: Task.loss_of.)"""
    own = own_loss(output)
    return plain_loss(logits_of(output, None, target, "loss"), target) if own is None else own


def takes_labels(model: nn.Module) -> bool:
    """Whether the model's forward names `labels`; seen through wrappers that hand on whatever they are given
    (for many processes, compiled, PEFT's)."""
    told = inspect.signature(model.forward).parameters
    if "labels" in told:
        return True
    kinds = {one.kind for one in told.values()}
    anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return anything and any(map(takes_labels, model.children()))


def plain_loss(found: Sequence[Logits], target: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
    """The default loss of logits; of several their sum, each with its own target."""
    targets = targets_of(target, len(found))
    if len(found) > 1 and any(item is None for item in targets):
        raise TaskError(
            f"loss: {len(found)} logits want a target each, a tuple of so many, and the target is "
            f"{shapes(target)}. Give the task a loss= of its own."
        )
    every = masks or [None] * len(found)
    return torch.stack([one_loss(*item) for item in zip(found, targets, every, strict=True)]).sum()


def batch_loss(found: Sequence[Logits], target: Any, output: Any, batch: Any) -> Tensor:
    """The default loss of a batch, without padding; of a causal model's scores, of the next tokens."""
    masks = [counting(logits, output, batch) for logits in found]
    if len(found) == 1 and causal(output, target, batch):
        logits, target, mask = moved(found[0], target, masks[0])
        found, masks = [logits], [mask]
    return plain_loss(found, target, masks)


def one_loss(logits: Logits, target: Any, mask: Tensor | None) -> Tensor:
    x, fit = logits.scores, f"output {shapes(logits.tensor)}, target {shapes(target)}"
    if not isinstance(target, Tensor):
        raise TaskError(f"loss: the target is no tensor: {fit}. {OTHER}")
    if logits.kind == "classes":
        if target.is_floating_point() and target.shape == logits.tensor.shape:  # chances of classes
            chances = target.movedim(logits.axis, 1).to(x.dtype)
            return mean(F.cross_entropy(x, chances, reduction="none"), mask)
        if target.is_floating_point():
            raise TaskError(f"loss: classes want integer targets: {fit}. {OTHER}")
        target = target.long() if mask is None else target.long().masked_fill(~mask, IGNORED)
        # Torch's mean of nothing is not a number; where nothing counts, nothing is to be learned.
        counts = target.shape != logits.places or bool((target != IGNORED).any())
        return F.cross_entropy(x, target, ignore_index=IGNORED) if counts else x.sum() * 0
    if logits.kind == "embedding":
        raise TaskError(f"loss: of an embedding none is plain: {fit}. {OTHER}")
    if target.shape != x.shape:
        raise TaskError(f"loss: {logits.kind} wants a target of the output's shape: {fit}. {OTHER}")
    error = F.binary_cross_entropy_with_logits if logits.kind == "binary" else F.mse_loss
    return mean(error(x, target.to(x.dtype), reduction="none"), mask)


OTHER = "Give the task a loss= or logits= of its own"


def mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of errors over the places that count; a place may have several, on the last axis."""
    if mask is None:
        return errors.mean()
    found = errors[mask]
    return found.sum() / max(found.numel(), 1)


def soften(
    output: Tensor, wanted: Tensor, temperature: float, mask: Tensor | None = None, *, kind: str = "classes",
    axis: int = 1,
) -> Tensor:  # fmt: skip
    """How far an output is from a teacher's, by its kind; classes on `axis`; `mask`: places that count."""
    if output.shape != wanted.shape:
        raise RefusedError(f"teacher: it answers {shapes(wanted)}, and the model {shapes(output)}: not alike")
    if kind in ("regression", "embedding"):
        return mean((output - wanted).square(), mask)
    x, y = output / temperature, wanted / temperature
    if kind == "binary":
        (no, yes), (no_wanted, yes_wanted) = ((F.logsigmoid(-z), F.logsigmoid(z)) for z in (x, y))
        apart = yes_wanted.exp() * (yes_wanted - yes) + no_wanted.exp() * (no_wanted - no)
        return mean(apart, mask) * temperature**2
    student, target = F.log_softmax(x, dim=axis), F.log_softmax(y, dim=axis)
    if mask is None:
        count = output.numel() / output.shape[axis]
        return F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2 / count
    apart = F.kl_div(student, target, reduction="none", log_target=True).sum(axis)
    return mean(apart, mask) * temperature**2


def soft_loss(
    mine: Sequence[Logits], theirs: Sequence[Logits], target: Any, output: Any, batch: Any, *,
    temperature: float,
) -> Tensor:  # fmt: skip
    """How far logits are from the teacher's. A causal model has its inputs as labels (causal.py), a masked
    one that computes its own loss those tokens that were masked: there -100 says nothing of padding."""
    kinds, wanted = ([item.kind for item in side] for side in (mine, theirs))
    if kinds != wanted:
        raise RefusedError(f"teacher: its logits are {', '.join(wanted)}, the model's {', '.join(kinds)}")
    inputs = own_loss(output) is not None and part(output, "encoder_last_hidden_state") is None
    inputs = inputs or causal(output, target, batch)
    terms = []
    for student, teacher, goal in zip(mine, theirs, targets_of(target, len(mine)), strict=True):
        mask = counting(student, output, batch)
        if not inputs and (there := marked(student, goal)) is not None:
            mask = there if mask is None else mask & there
            mask = None if bool(mask.all()) else mask
        x, y = student.tensor, teacher.tensor
        terms.append(soften(x, y, temperature, mask, kind=student.kind, axis=student.axis))
    return torch.stack(terms).sum()
