"""Stats: second moments of a layer's inputs, from calibration batches.

gram[i, j] = mean over inputs of x_i x_j      [I, I], I = inputs of the flattened row (channels * kernel)
Cost: one pass over the calibration batches for each chunk of layers whose grams fit in memory together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.sites import Site
from tersor.model.task import Task

POSITIONS = 4096  # inputs of a convolution used per batch: more change the estimate little and cost much


def has_gram(site: Site) -> bool:
    """Whether the inputs of this weight can be seen: linear layers, ungrouped convolutions in 1-D and 2-D."""
    return site.kind == "linear" or (site.kind == "conv" and site.groups == 1 and len(site.shape) <= 4)


def grams(model: nn.Module, task: Task, sites: Iterable[Site]) -> dict[str, Tensor]:
    """The second moment of the inputs of each site's layer, float32 [I, I]. `model` is a copy that may be
    hooked.

    A layer that calibration never reached is left out of the result.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    modules = dict(model.named_modules())

    def watch(site: Site, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = inputs_of(module, args[0].detach().float())  # [N, I]
            sums[site.name] = sums.get(site.name, 0) + x.T @ x
            counts[site.name] = counts.get(site.name, 0) + len(x)

        return module.register_forward_pre_hook(hook)

    hooks = [watch(site, modules[site.layer]) for site in sites]
    try:
        with evaluating(model), steady(task.calibrate):
            for batch in task.batches("calibrate"):
                task.run(model, move(batch, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """The rows that this layer's weight is multiplied with, [N, I]."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    weight = module.weight
    image = x
    if weight.ndim == 3:  # a 1-D convolution is a 2-D one of height 1
        image = x.unsqueeze(2)
    kernel, *rest = (_two(getattr(module, key)) for key in ("kernel_size", "dilation", "stride"))
    padding = module.padding if isinstance(module.padding, str) else _two(module.padding, 0)
    if padding == "same":
        pads = [d * (k - 1) for k, d in zip(kernel, rest[0], strict=True)]
        image = F.pad(image, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
    pad = (0, 0) if isinstance(padding, str) else padding
    patches = F.unfold(image, kernel, dilation=rest[0], padding=pad, stride=rest[1])  # [B, I, P]
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return rows[:: max(1, len(rows) // POSITIONS)]


def _two(value: tuple[int, ...] | int, fill: int = 1) -> tuple[int, int]:
    """A setting of a 1-D or 2-D convolution as the 2-D one's."""
    pair = (value,) if isinstance(value, int) else tuple(value)
    return (fill, pair[0]) if len(pair) == 1 else (pair[0], pair[1])
