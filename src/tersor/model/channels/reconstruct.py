"""Reconstruct: after a cut, refit each weight that reads fewer units, layer by layer, without labels.

W' = argmin |W' X' + b' - Y|^2 + damp |W' - W|^2      X' its inputs in the cut model, refitted so far
Y the outputs of the same layer before the cut; both by their moments (model/layer_moments.py)
Unlike a fit of each layer alone, a layer also corrects what earlier layers got wrong (as in AdaRound's and
GPTQ's sequential forms). A batch norm that follows takes the mean of the error; a bias takes it otherwise.
Cost for each layer: a pass of both models over the calibration batches up to it, and one solve of I^3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.forms.form import to_rows
from tersor.maths.damping import damping
from tersor.maths.least_squares import nearest_fit
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.layer_moments import Moments, calls_of, layer_moments
from tersor.model.layer_rows import STOCK
from tersor.model.output_comparison import Squares
from tersor.model.outputs import tensors_of
from tersor.model.task import Task

TURNS = 96  # refitted one after the other; more are refitted in turns of several


class Layer(NamedTuple):
    """A layer that reads fewer units than before."""

    path: str
    outputs: Tensor  # int64: which of the outputs before the cut it still has
    norm: str = ""  # the batch norm that alone reads its outputs
    still: bool = False  # its bias stays: the weights alone are refitted


def refitted(before: nn.Module, after: nn.Module, task: Task, layers: list[Layer],
             watch: Callable[[int, int, str], None]) -> dict[str, Tensor]:  # fmt: skip
    """New values of the tensors that change, by name. Both models are private copies; `after` is changed."""
    changed: dict[str, Tensor] = {}
    olds, news = dict(before.named_modules()), dict(after.named_modules())
    by_path = {
        layer.path: layer for layer in layers
        if isinstance(news.get(layer.path), STOCK) and isinstance(olds.get(layer.path), STOCK)
    }  # fmt: skip
    calls = calls_of(before, task, by_path)
    size = -(-len(calls) // TURNS) or 1
    for start in range(0, len(calls), size):
        some = {path: count for together in calls[start : start + size] for path, count in together.items()}
        watch(start, len(calls), ", ".join(some))
        outputs = {path: by_path[path].outputs for path in some}
        for path, moments in layer_moments(before, after, task, some, outputs).items():
            if moments.finite:
                changed |= refit(after, by_path[path], moments)
    return changed


@torch.no_grad()
def refit(after: nn.Module, layer: Layer, moments: Moments) -> dict[str, Tensor]:
    module: Any = after.get_submodule(layer.path)
    weight = to_rows(module.weight.detach().cpu(), 0).double()
    w = weight.unflatten(0, (getattr(module, "groups", 1), -1))  # [G, O, I]
    xx, yx = moments.xx, moments.yx
    mean_x, mean_y, h, c = xx[:, -1, :-1], yx[:, :, -1], xx[:, :-1, :-1], yx[:, :, :-1]
    still = layer.still and module.bias is not None
    if still:
        bias = module.bias.detach().cpu().double().unflatten(0, mean_y.shape)  # [G, O]
        c = c - bias[:, :, None] * mean_x[:, None]
    elif module.bias is not None or layer.norm:  # a constant error is taken elsewhere
        h, c = h - mean_x[:, :, None] * mean_x[:, None], c - mean_y[:, :, None] * mean_x[:, None]
    new = nearest_fit(w, h, c, h.new_tensor([damping(each, moments.count) for each in h]))
    module.weight.copy_(new.reshape(module.weight.shape))
    found = {f"{layer.path}.weight": module.weight.detach().clone()}
    shift = (mean_y - (new @ mean_x[..., None])[..., 0]).flatten()  # the bias that the layer should have
    if still:
        return found
    if module.bias is not None:
        module.bias.copy_(shift)
        found[f"{layer.path}.bias"] = module.bias.detach().clone()
    elif layer.norm:
        norm: Any = after.get_submodule(layer.norm)
        norm.running_mean.sub_(shift.to(norm.running_mean))
        found[f"{layer.norm}.running_mean"] = norm.running_mean.detach().clone()
    return found


def apart(before: nn.Module, after: nn.Module, task: Task) -> float:
    """The squared difference of their outputs over the square of the first one's, on calibration batches.
    NaN if they cannot be compared: the number of outputs or their sizes differ, as of a detector."""
    found = Squares()
    with evaluating(before), evaluating(after), steady(task.calibrate):
        for batch in task.batches(task.shown):
            old, new = ([*tensors_of(task.answer(m, move(batch, device_of(m))))] for m in (before, after))
            if [x.shape for x in old] != [y.shape for y in new]:
                return nan
            found.add(old, new)
    return found.share()


@torch.no_grad()
def settled_norms(model: nn.Module, task: Task, resting: Sequence[str] = ()) -> dict[str, Tensor]:
    """Statistics of all batch norms but the resting ones, estimated anew: the mean over calibration batches.
    The model is changed."""
    norms: dict[str, Any] = {
        path: module for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        and path not in resting
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
