"""Trial: whether a task fits a model, seen on a batch before anything starts.

the model    answers a calibration batch (an evaluation batch where there is none)      eval mode
SCORES       metric(output, target) of an evaluation batch                              eval mode
LOSS, SOFT   loss(output, target), and what a teacher is compared by, of a training batch    train mode
A step that needs no loss asks for none. Training is tried on a copy: running statistics and random state of
the given model stay. Cost: a forward or two.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.model.batches import device_of, evaluating, fits, move, shapes, steady
from tersor.model.losses import soft_loss, task_loss
from tersor.model.needs import Needs
from tersor.model.outputs import as_floats, tensors_of
from tersor.model.scoring import score

if TYPE_CHECKING:
    from tersor.model.task import Task


def tried(task: Task, model: nn.Module, needs: Needs) -> None:
    """TaskError where the task does not fit; see Task.check."""
    shown = "evaluate" if Needs.SCORES in needs else task.shown
    with evaluating(model), steady(getattr(task, shown)):
        batch = first(task, model, shown)
        output = task._output(model, batch)
        heard(task, model, batch, output)
        if Needs.SCORES in needs:
            score(task, output, batch)
    if needs & (Needs.LOSS | Needs.SOFT):
        trained(task, copy.deepcopy(model).train(), needs)


def trained(task: Task, model: nn.Module, needs: Needs) -> None:
    """The losses of a training batch, of a model that may be changed."""
    with steady(task.train), torch.enable_grad():
        batch = first(task, model, "train")
        output = as_floats(task._output(model, batch))
        if Needs.LOSS in needs:
            target = shapes(task.maybe_target(batch))
            fit = f"output {shapes(output)}, target {target}"
            loss = fits(lambda: task_loss(task, output, batch), f"{task._who}: the loss does not fit: {fit}")
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TaskError(
                    f"{task._who}: the loss gave {shapes(loss)}, but it is one number, a scalar tensor."
                )
            if not torch.isfinite(loss).all():
                raise TaskError(
                    f"{task._who}: the loss is {loss.item()} on the first batch ({fit}){bad_weights(model)}."
                )
    if Needs.SOFT in needs:
        with evaluating(model), steady(task.train):  # as a teacher answers
            wanted = as_floats(task._output(model, batch))
            fits(
                lambda: soft_loss(task, output, wanted, batch, 1.0),
                f"{task._who}: what is compared with a teacher's answers does not fit: {shapes(output)}",
            )


def first(task: Task, model: nn.Module, word: str) -> Any:
    return move(next(iter(task.batches(word))), device_of(model))


def heard(task: Task, model: nn.Module, batch: Any, output: Any) -> None:
    """An answer of NaN that comes from the weights or the batch, and not from places that do not count."""
    if not any(bool(tensor.isnan().any()) for tensor in tensors_of(output) if tensor.is_floating_point()):
        return
    given = any(bool(tensor.isnan().any()) for tensor in tensors_of(batch) if tensor.is_floating_point())
    if given or (why := bad_weights(model)):
        because = ", which holds NaN itself" if given else why
        raise TaskError(f"{task._who}: the model's answers to the first batch are NaN{because}.")


def bad_weights(model: nn.Module) -> str:
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    names = f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}"
    return f": these weights are not finite: {names}" if bad else ""
