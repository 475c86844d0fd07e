"""Losses: the one of the task, the default one, and that of a teacher's soft targets.

loss = (1 - share) * task loss + share * soft targets + features * mean squared difference of named layers
soft targets   classes      T^2 * KL(softmax(teacher / T) || softmax(student / T))      Hinton 2015
               binary       T^2 * KL of the chances sigmoid(x / T) and their rest       the same, K = 2
               regression, embedding    mean squared difference                         Romero 2015
T^2 keeps the gradients' size when T changes. Means are over places that count: no padding, no target of -100.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError, TaskError
from tersor.model.batches import shapes
from tersor.model.logits import IGNORED, Logits, counting, logits_of, marked, targets_of
from tersor.model.outputs import as_floats, part

if TYPE_CHECKING:
    from tersor.model.fit import Plan
    from tersor.model.task import Task


def default_loss(output: Any, target: Any) -> Tensor:
    """What a task without a loss of its own is trained with: the model's own where it computes one, else
    cross entropy, binary cross entropy or the mean squared error, by what the output is. (In a task it goes
    by the task's logits and the batch's mask: task_loss.)"""
    own = own_loss(output)
    return plain_loss(logits_of(output, None, target, "loss"), target) if own is None else own


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model computes itself from labels, as Hugging Face's do: `.loss`, one number."""
    loss = part(output, "loss")
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


def takes_labels(model: nn.Module) -> bool:
    """Whether the model's forward names `labels`; seen through what wraps it for many processes."""
    while "labels" not in inspect.signature(model.forward).parameters:
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner
    return True


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


def one_loss(logits: Logits, target: Any, mask: Tensor | None) -> Tensor:
    x, fit = logits.scores, f"output {shapes(logits.tensor)}, target {shapes(target)}"
    if not isinstance(target, Tensor):
        raise TaskError(f"loss: the target is no tensor: {fit}. {OTHER}")
    if logits.kind == "classes":
        if target.is_floating_point() and target.shape == logits.tensor.shape:  # chances of classes
            return F.cross_entropy(x, target.movedim(logits.axis, 1).to(x.dtype))
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


def task_loss(task: Task, output: Any, batch: Any) -> Tensor:
    """The loss of an output that is given raw: the task's own, the model's own, or the default one."""
    if task.loss is not default_loss:
        return task.loss(output, task.target_of(batch))
    if (loss := own_loss(output)) is not None:
        return loss
    target = task.target_of(batch)
    found = task.logits_of(output, target)
    return plain_loss(found, target, [counting(logits, output, batch) for logits in found])


def soft_loss(task: Task, output: Any, wanted: Any, batch: Any, temperature: float) -> Tensor:
    """How far an output is from the teacher's. A causal model that computes its own loss has its inputs as
    labels, and a masked one those tokens that were masked: there -100 says nothing of padding."""
    target = task.maybe_target(batch)
    mine, theirs = task.logits_of(output, target), task.logits_of(wanted, target)
    if [item.kind for item in mine] != [item.kind for item in theirs]:
        raise RefusedError(
            f"teacher: it answers {shapes(wanted)}, and the model {shapes(output)}: not alike. Give logits= "
            "that finds the same in both"
        )
    inputs = own_loss(output) is not None and part(output, "encoder_last_hidden_state") is None
    targets = targets_of(target, len(mine))
    terms = []
    for student, teacher, goal in zip(mine, theirs, targets, strict=True):
        mask = counting(student, output, batch)
        if not inputs and (there := marked(student, goal)) is not None:
            mask = there if mask is None else mask & there
            mask = None if bool(mask.all()) else mask
        terms.append(
            soften(
                student.tensor, teacher.tensor, temperature, mask, kind=student.kind,
                axis=student.axis,
            )
        )  # fmt: skip
    return torch.stack(terms).sum()


def loss_of(  # noqa: PLR0917 (all six are the loop's own)
    net: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    plan: Plan,
    batch: Any,
    caught: dict[str, list[Tensor]],
) -> Tensor:
    """The loss of one batch of a training."""
    for found in caught.values():
        found.clear()
    output = as_floats(task.run(net, batch))
    terms: list[Tensor] = []
    if plan.share < 1:
        terms.append((1 - plan.share) * task_loss(task, output, batch))
    if teacher is not None:
        with torch.no_grad():
            wanted = as_floats(task.run(teacher, batch))
        if plan.share > 0:
            terms.append(plan.share * soft_loss(task, output, wanted, batch, plan.temperature))
        for name, found in caught.items():
            half = len(found) // 2  # the student's, then the teacher's: a layer may run more than once
            if not half:
                raise RefusedError(f"features: {name} is there, but gave no output: nothing calls it")
            for mine, theirs in zip(found[:half], found[half:], strict=True):
                terms.append(plan.feature_weight * F.mse_loss(mine.float(), theirs.float()))
    return sum(terms[1:], terms[0].float())
