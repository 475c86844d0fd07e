"""Stats: second moments of a layer's inputs, from calibration batches.

gram[i, j] = mean over inputs of x_i x_j      [I, I], I = inputs of the flattened row (channels * kernel)
Cost: one pass over the calibration batches for each chunk of layers whose grams fit in memory together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.forms.form import to_rows
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.layer_rows import STOCK, input_rows, tokens
from tersor.model.sites import Site
from tersor.model.task import Task

TOLERANCE = 1e-2  # as a fraction of the largest output, which may be computed in 16 bits


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
            x = input_rows(module, (*args, *kwargs.values())[0].detach().float(), batch)[:, 0]  # [N, I]
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
            rows = tokens(x.detach().float(), batch)[:, 0]
            sums[site.name] = sums.get(site.name, 0) + rows.T @ rows
            counts[site.name] = counts.get(site.name, 0) + len(rows)

        return module.register_forward_hook(hook, with_kwargs=True)

    strange: set[str] = set()
    batch: Any = None  # the present one
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
