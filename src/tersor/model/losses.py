"""Losses: the default loss of a task, and the loss of a teacher's soft targets.

soft targets   classes      T^2 * KL(softmax(teacher / T) || softmax(student / T))      Hinton 2015
               binary       T^2 * KL of the probabilities sigmoid(x / T), 1 - that      the same, K = 2
               regression, embedding    mean squared difference                         Romero 2015
T^2 keeps the gradients' size when T changes. Means leave out padding and targets of -100.
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
from tersor.model.logits import IGNORED, Logits, logits_of, not_ignored, not_padding, targets_of
from tersor.model.outputs import own_loss, part


def default_loss(output: Any, target: Any) -> Tensor:
    """The loss of a task without `loss=`: the model's own if it computes one, else by the kind of the output
    cross entropy, binary cross entropy or the mean squared error. (In a task, Task.loss_of uses the task's
    logits and the batch's mask instead.)"""
    own = own_loss(output)
    return plain_loss(logits_of(output, None, target, "loss"), target) if own is None else own


def takes_labels(model: nn.Module) -> bool:
    """Whether the model's forward takes `labels`. Looks inside wrappers with forward(*args, **kwargs):
    DistributedDataParallel, compiled modules, PEFT."""
    parameters = inspect.signature(model.forward).parameters
    if "labels" in parameters:
        return True
    kinds = {parameter.kind for parameter in parameters.values()}
    anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return anything and any(map(takes_labels, model.children()))


def plain_loss(found: Sequence[Logits], target: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
    """The default loss of logits. Several logits: the sum of their losses, each with its own target."""
    targets = targets_of(target, len(found))
    if len(found) > 1 and any(item is None for item in targets):
        raise TaskError(
            f"loss: {len(found)} logits need a tuple of {len(found)} targets, and the target is "
            f"{shapes(target)}. Give the task a loss= of its own."
        )
    every = masks or [None] * len(found)
    return torch.stack([one_loss(*item) for item in zip(found, targets, every, strict=True)]).sum()


def batch_loss(found: Sequence[Logits], target: Any, output: Any, batch: Any) -> Tensor:
    """The default loss of a batch, without padding. A causal model's scores are those of the next tokens."""
    masks = [not_padding(logits, output, batch) for logits in found]
    if len(found) == 1 and causal(output, target, batch):
        logits, target, mask = moved(found[0], target, masks[0])
        found, masks = [logits], [mask]
    return plain_loss(found, target, masks)


def one_loss(logits: Logits, target: Any, mask: Tensor | None) -> Tensor:
    x, fit = logits.scores, f"output {shapes(logits.tensor)}, target {shapes(target)}"
    if not isinstance(target, Tensor):
        raise TaskError(f"loss: the target is not a tensor: {fit}. {OTHER}")
    if logits.kind == "classes":
        if target.is_floating_point() and target.shape == logits.tensor.shape:
            probabilities = target.movedim(logits.axis, 1).to(x.dtype)
            return mean(F.cross_entropy(x, probabilities, reduction="none"), mask)
        if target.is_floating_point():
            raise TaskError(f"loss: classes need integer targets: {fit}. {OTHER}")
        target = target.long() if mask is None else target.long().masked_fill(~mask, IGNORED)
        # torch's mean over no positions is NaN; a batch without a target that counts has loss 0.
        counts = target.shape != logits.places or bool((target != IGNORED).any())
        return F.cross_entropy(x, target, ignore_index=IGNORED) if counts else x.sum() * 0
    if logits.kind == "embedding":
        raise TaskError(f"loss: an embedding has no default loss: {fit}. {OTHER}")
    if target.shape != x.shape:
        raise TaskError(f"loss: {logits.kind} needs a target of the output's shape: {fit}. {OTHER}")
    error = F.binary_cross_entropy_with_logits if logits.kind == "binary" else F.mse_loss
    return mean(error(x, target.to(x.dtype), reduction="none"), mask)


OTHER = "Give the task a loss= or logits= of its own"


def mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of errors over the positions in `mask`, each of which may have several on the last axis."""
    if mask is None:
        return errors.mean()
    found = errors[mask]
    return found.sum() / max(found.numel(), 1)


def soften(
    output: Tensor, wanted: Tensor, temperature: float, mask: Tensor | None = None, *, kind: str = "classes",
    axis: int = 1,
) -> Tensor:  # fmt: skip
    """The distillation loss of an output and a teacher's, by kind. Classes are on `axis`; `mask`: positions
    that count. RefusedError if the shapes differ."""
    if output.shape != wanted.shape:
        raise RefusedError(
            f"teacher: its output is {shapes(wanted)}, but the model's is {shapes(output)}: the shapes differ"
        )
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
    """The distillation loss of logits and the teacher's. The labels of a causal model are its inputs
    (causal.py), those of a masked language model only the masked tokens: there -100 does not mean padding."""
    kinds, wanted = ([item.kind for item in side] for side in (mine, theirs))
    if kinds != wanted:
        raise RefusedError(f"teacher: its logits are {', '.join(wanted)}, the model's are {', '.join(kinds)}")
    inputs = own_loss(output) is not None and part(output, "encoder_last_hidden_state") is None
    inputs = inputs or causal(output, target, batch)
    terms = []
    for student, teacher, goal in zip(mine, theirs, targets_of(target, len(mine)), strict=True):
        mask = not_padding(student, output, batch)
        if not inputs and (valid := not_ignored(student, goal)) is not None:
            mask = valid if mask is None else mask & valid
            mask = None if bool(mask.all()) else mask
        x, y = student.tensor, teacher.tensor
        terms.append(soften(x, y, temperature, mask, kind=student.kind, axis=student.axis))
    return torch.stack(terms).sum()
