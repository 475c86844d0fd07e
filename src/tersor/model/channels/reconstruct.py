"""Reconstruct: after a cut, refit each weight that reads fewer units, layer by layer, without labels.

W' = argmin |W' X' + b' - Y|^2 + damp |W' - W|^2      X' its inputs in the cut model, refitted so far
Y the outputs of the same layer before the cut; solved from the moments X' X'^T and Y X'^T (normal equations)
Unlike a fit of each layer alone, a layer also corrects what earlier layers got wrong (as in AdaRound's and
GPTQ's sequential forms). A batch norm that follows takes the mean of the error; a bias takes it otherwise.
Cost for each layer: a pass of both models over the calibration batches up to it, and one solve of I^3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.forms.form import to_rows
from tersor.maths.damping import damping
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.outputs import tensors_of
from tersor.model.stats import POSITIONS, STOCK, inputs_of
from tersor.model.task import Task

LAYERS = 96  # refitted one after the other; more are refitted in rounds of several


class Layer(NamedTuple):
    """A layer that reads fewer units than before."""

    path: str
    outputs: Tensor  # int64: which of the outputs before the cut it still has
    norm: str = ""  # the batch norm that alone reads its outputs


class Passed(Exception):  # noqa: N818  control flow: the layer was reached, the rest of the forward is not needed
    """The layers were reached."""


def refitted(before: nn.Module, after: nn.Module, task: Task, layers: list[Layer],
             watch: Callable[[int, int, str], None]) -> dict[str, Tensor]:  # fmt: skip
    """New values of the tensors that change, by name. Both models are private copies; `after` is changed."""
    changed: dict[str, Tensor] = {}
    size = -(-len(layers) // LAYERS) or 1
    for start in range(0, len(layers), size):
        some = layers[start : start + size]
        watch(start, len(layers), some[0].path)
        sums = moments(before, after, task, some)
        for layer in some:
            if layer.path in sums:
                changed |= refit(after, layer, sums[layer.path])
    return changed


class Sums:
    """Running moments of one layer: X' with a constant 1, and Y."""

    def __init__(self) -> None:
        self.xx: Any = 0
        self.yx: Any = 0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        self.xx = self.xx + x.T @ x
        self.yx = self.yx + y.double().T @ x
        self.count += len(x)


def moments(before: nn.Module, after: nn.Module, task: Task, layers: list[Layer]) -> dict[str, Sums]:
    found: dict[str, Sums] = {}
    olds, news = dict(before.named_modules()), dict(after.named_modules())
    wanted: dict[str, list[Tensor]] = {}
    strange: set[str] = set()
    handles = []
    for layer in layers:
        old, new = olds.get(layer.path), news.get(layer.path)
        if not isinstance(new, STOCK) or not isinstance(old, STOCK) or getattr(new, "groups", 1) != 1:
            continue

        def keep(module: Any, args: Any, out: Tensor, layer: Layer = layer) -> None:
            rows = out.detach().flatten(2).transpose(1, 2).reshape(-1, out.shape[1]) if (
                not isinstance(module, nn.Linear)) else out.detach().reshape(-1, out.shape[-1])  # fmt: skip
            rows = rows if isinstance(module, nn.Linear) else rows[:: max(1, len(rows) // POSITIONS)]
            wanted.setdefault(layer.path, []).append(rows[:, layer.outputs].float())
            stop(wanted)

        def see(module: Any, args: Any, out: Tensor, layer: Layer = layer) -> None:
            queue = wanted.get(layer.path)
            x = inputs_of(module, args[0].detach().float()) if args else None
            if not queue or x is None or len(x) != len(queue[0]):
                strange.add(layer.path)
                return
            found.setdefault(layer.path, Sums()).add(x, queue.pop(0))
            stop(found)

        def stop(reached: Mapping[str, Any]) -> None:
            if len(layers) == 1 and layers[0].path in reached:
                raise Passed

        handles += [old.register_forward_hook(keep), new.register_forward_hook(see)]
    try:
        with evaluating(before), evaluating(after), steady(task.calibrate):
            for batch in task.batches(task.shown):
                wanted.clear()
                for model in (before, after):
                    with suppress(Passed):
                        task.answer(model, move(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {path: each for path, each in found.items() if path not in strange}


@torch.no_grad()
def refit(after: nn.Module, layer: Layer, sums: Sums) -> dict[str, Tensor]:
    module: Any = dict(after.named_modules())[layer.path]
    weight = to_rows(module.weight.detach(), 0).double().cpu()  # [O, I]
    xx, yx = (each.cpu() / sums.count for each in (sums.xx, sums.yx))
    mean_x, mean_y = xx[-1, :-1], yx[:, -1]
    shifts = module.bias is not None or bool(layer.norm)  # a constant error is taken elsewhere
    h, c = xx[:-1, :-1], yx[:, :-1]
    if shifts:
        h, c = h - mean_x[:, None] * mean_x, c - mean_y[:, None] * mean_x
    damped = h + damping(h, sums.count) * torch.eye(len(h), dtype=h.dtype)
    new = weight + torch.linalg.solve(damped, (c - weight @ h).T).T
    if not new.isfinite().all():
        return {}
    module.weight.copy_(new.reshape(module.weight.shape).to(module.weight))
    found = {f"{layer.path}.weight": module.weight.detach().clone()}
    shift = mean_y - new @ mean_x  # the bias that the layer should have
    if module.bias is not None:
        module.bias.copy_(shift.to(module.bias))
        found[f"{layer.path}.bias"] = module.bias.detach().clone()
    elif layer.norm:
        norm: Any = dict(after.named_modules())[layer.norm]
        norm.running_mean.sub_(shift.to(norm.running_mean))
        found[f"{layer.norm}.running_mean"] = norm.running_mean.detach().clone()
    return found


def apart(before: nn.Module, after: nn.Module, task: Task) -> float:
    """The squared difference of their outputs over the square of the first one's, on calibration batches."""
    error = power = 0.0
    with evaluating(before), evaluating(after), steady(task.calibrate):
        for batch in task.batches(task.shown):
            old, new = (tensors_of(task.answer(m, move(batch, device_of(m)))) for m in (before, after))
            for x, y in zip(old, new, strict=True):
                if x.is_floating_point():
                    error += float((x - y).double().square().sum())
                    power += float(x.double().square().sum())
    return error / max(power, 1e-300)


@torch.no_grad()
def settled_norms(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Statistics of all batch norms, estimated anew: the mean over calibration batches. The model is
    changed."""
    norms: dict[str, Any] = {
        path: module for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }  # fmt: skip
    if not norms:
        return {}
    momenta = {path: norm.momentum for path, norm in norms.items()}
    with evaluating(model), steady(task.calibrate):
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of all batches
            norm.train()
        try:
            for batch in task.batches(task.shown):
                task.answer(model, move(batch, device_of(model)))
        except TaskError:  # a batch norm refuses a batch of one value
            return {}
    found = {}
    for path, norm in norms.items():
        norm.momentum = momenta[path]
        for key in ("running_mean", "running_var"):
            found[f"{path}.{key}"] = getattr(norm, key).detach().clone()
    return found
