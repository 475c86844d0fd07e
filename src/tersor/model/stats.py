"""Stats: second moments of a layer's inputs, from calibration batches.

gram[i, j] = mean over inputs of x_i x_j      [I, I], I = inputs of the flattened row (channels * kernel)
Cost: one pass over the calibration batches for each chunk of layers whose grams fit in memory together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.forms.form import to_rows
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.scaled_inputs import ScaledInputs
from tersor.model.sites import Site
from tersor.model.task import Task

STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d)
TOLERANCE = 1e-2  # as a fraction of the largest output, which may be computed in 16 bits
POSITIONS = 4096  # inputs of a convolution used per batch: more would change the estimate little


def has_gram(site: Site) -> bool:
    """Whether `grams` supports this weight: matrices, and ungrouped convolutions in 1-D and 2-D."""
    if site.kind == "linear":
        return len(site.shape) == 2
    return site.kind == "conv" and site.groups == 1 and len(site.shape) <= 4


class Gram(NamedTuple):
    """The second moment of a layer's inputs."""

    moment: Tensor  # float32 [I, I], on the CPU like forms
    samples: int  # that it is the mean of


def grams(model: nn.Module, task: Task, sites: Iterable[Site]) -> dict[str, Gram]:
    """The second moment of the inputs of each site's layer.
    `model` is a copy, on which hooks are set.

    Left out of the result: layers that no calibration batch reaches, and layers of the user's own classes
    whose output is not their input times the weight plus a constant.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    modules = dict(model.named_modules())

    def watch(site: Site, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = inputs_of(module, (*args, *kwargs.values())[0].detach().float())  # [N, I]
            sums[site.name] = sums.get(site.name, 0) + x.T @ x
            counts[site.name] = counts.get(site.name, 0) + len(x)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def watch_other(site: Site, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        w = to_rows(dict(module.named_parameters())[site.name.rpartition(".")[2]].detach().float(), site.axis)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            if x is None or site.name in strange or not is_product(x, w, output):
                strange.add(site.name)
                return
            rows = x.detach().float().reshape(-1, x.shape[-1])
            sums[site.name] = sums.get(site.name, 0) + rows.T @ rows
            counts[site.name] = counts.get(site.name, 0) + len(rows)

        return module.register_forward_hook(hook, with_kwargs=True)

    strange: set[str] = set()
    hooks = []
    for site in sites:
        module = modules[site.layer]
        if isinstance(module, STOCK) and site.name.rpartition(".")[2] == "weight":
            hooks.append(watch(site, module))
        elif site.kind == "linear":
            hooks.append(watch_other(site, module))
    try:
        with evaluating(model), steady(task.calibrate):
            for batch in task.batches("calibrate"):
                task.answer(model, move(batch, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: Gram((total / counts[name]).cpu(), counts[name])
        for name, total in sums.items() if name not in strange
    }  # fmt: skip


def is_product(x: Any, w: Tensor, output: Any) -> bool:
    """Whether a layer's output is x w^T, plus a bias; w [O, I]."""
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim and x.shape[-1] == w.shape[1]):
        return False
    if output.shape != (*x.shape[:-1], len(w)) or not output.is_floating_point():
        return False
    product = x.detach().float() @ w.T
    bias = (output.detach().float() - product).reshape(-1, len(w))  # [N, O]
    size = product.abs().amax() + bias.abs().amax()
    return bool(((bias - bias[:1]).abs() <= TOLERANCE * size).all())


def inputs_of(module: Any, x: Tensor) -> Tensor:
    """The input vectors that this layer's weight is multiplied with, [N, I]."""
    if isinstance(module, nn.Linear):
        x = x * module.factor if isinstance(module, ScaledInputs) else x
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The layer's own argument for F.pad, which it has for every padding mode.
    image = F.pad(x, module._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if len(kernel) == 1:  # a 1-D convolution is a 2-D one of height 1
        image, kernel, dilation, stride = image.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = F.unfold(image, kernel, dilation=dilation, stride=stride)  # [B, I, P]
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return rows[:: max(1, len(rows) // POSITIONS)]
