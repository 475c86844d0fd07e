"""Layer moments: what rounding a layer needs to know, from the model before and the one rounded so far.

xx [G, I + 1, I + 1]   mean of x x^T; x: what a group of the layer reads in the rounded model, and a 1
yx [G, O, I + 1]       mean of y x^T; y: what the layer computes from the same sample in the model before
Both models run side by side over the calibration batches, each only as far as the layers. layer_rows.py says
which rows count.
Cost: for each call a pass of both models up to the layers, and a product of POSITIONS * I^2 a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.layer_rows import STOCK, input_rows, output_rows
from tersor.model.scaled_inputs import ScaledInputs
from tersor.model.stats import TOLERANCE
from tersor.model.task import Task

FORWARDS = {kind.forward for kind in STOCK}


class Passed(Exception):  # noqa: N818  control flow: the rest of the forward is not needed
    """The layers were reached."""


class Moments:
    """Means over the samples of one layer, float64 on the CPU."""

    def __init__(self) -> None:
        self.sums: Any = (0, 0)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [N, G, I], y [N, G, O]"""
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2).double().transpose(0, 1)  # [G, N, I + 1]
        xx, yx = self.sums
        self.sums = xx + x.transpose(1, 2) @ x, yx + y.double().permute(1, 2, 0) @ x
        self.count += x.shape[1]

    @property
    def xx(self) -> Tensor:
        return (self.sums[0] / self.count).cpu()

    @property
    def yx(self) -> Tensor:
        return (self.sums[1] / self.count).cpu()

    @property
    def finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in self.sums)


def calls_of(model: nn.Module, task: Task, paths: Iterable[str]) -> list[dict[str, int]]:
    """How often the first batch runs each layer, in the order of the first calls. Layers that
    read the same tensor one after the other are together."""
    calls: dict[str, int] = {}
    found: list[dict[str, int]] = []
    modules = dict(model.named_modules())
    read: Any = None  # by the last layer

    def counting(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, y: Any) -> None:
            nonlocal read
            x = next(iter((*args, *kwargs.values())), None)
            if path not in calls:
                if x is not read or not found:
                    found.append({})
                found[-1][path] = 0
            read, calls[path] = x, calls.get(path, 0) + 1

        return hook

    handles = [modules[path].register_forward_hook(counting(path), with_kwargs=True) for path in paths]
    try:
        with evaluating(model), steady(task.calibrate):
            task.answer(model, move(next(iter(task.batches(task.shown))), device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return [{path: calls[path] for path in together} for together in found]


def layer_moments(
    before: nn.Module, after: nn.Module, task: Task, calls: Mapping[str, int],
    outputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Moments]:  # fmt: skip
    """The moments of these layers: linear ones and convolutions in 1-D and 2-D. `calls`: how often a batch
    runs each. `outputs`: of a layer that has fewer of them after, which ones, int64; None: all. Both models
    are private copies.

    Left out: a layer that computes something else than its weight times its input plus its bias, and one that
    the two models do not call alike.
    """
    found: dict[str, Moments] = {path: Moments() for path in calls}
    wanted: dict[str, list[Tensor]] = {}
    left: dict[str, int] = {}
    strange: set[str] = set()
    batch: Any = None  # the present one

    def passed(path: str) -> None:
        left[path] -= 1
        if not any(left.values()):
            raise Passed

    def keeping(path: str) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> None:
            rows = output_rows(module, y.detach().float(), batch)
            if outputs is not None:
                groups = getattr(news[path], "groups", 1)
                rows = rows.flatten(1)[:, outputs[path].to(rows.device)].unflatten(1, (groups, -1))
            wanted.setdefault(path, []).append(rows)
            passed(path)

        return hook

    def adding(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, y: Tensor) -> None:
            x = input_rows(module, read_by(module, args, kwargs).detach().float(), batch)
            queue = wanted.get(path)
            if not queue or len(queue[0]) != len(x) or not is_product(module, x, y, batch):
                strange.add(path)
            if path not in strange and queue:
                found[path].add(x, queue.pop(0))
            passed(path)

        return hook

    olds, news = dict(before.named_modules()), dict(after.named_modules())
    handles = [olds[path].register_forward_hook(keeping(path)) for path in calls]
    handles += [news[path].register_forward_hook(adding(path), with_kwargs=True) for path in calls]
    try:
        with evaluating(before), evaluating(after), steady(task.calibrate):
            for batch in task.batches(task.shown):
                wanted.clear()
                for model in (before, after):
                    left.update(calls)
                    with suppress(Passed):
                        task.answer(model, move(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {path: each for path, each in found.items() if each.count and path not in strange}


class Reads(TorchFunctionMode):
    """What functions read beside a weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.found = weight, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and args[1] is self.weight:
            self.found.append(args[0])
        return func(*args, **kwargs or {})


def read_by(module: Any, args: Any, kwargs: Any) -> Tensor:
    """What the product of a layer reads: its argument, or what a forward of the user's own makes of that
    first, such as a padded image."""
    given: Tensor = next(iter((*args, *kwargs.values())))
    if type(module).forward in FORWARDS or isinstance(module, ScaledInputs):
        return given
    with torch.no_grad(), Reads(module.weight) as reads:
        module.forward(*args, **kwargs)
    return reads.found[0] if len(reads.found) == 1 else given


def is_product(module: Any, x: Tensor, y: Tensor, batch: Any) -> bool:
    """Whether a layer's output is its weight times x, plus its bias. x [N, G, I], a few samples are tried."""
    weight = module.weight.detach().float().flatten(1).unflatten(0, (x.shape[1], -1))  # [G, O, I]
    expected = torch.einsum("ngi,goi->ngo", x[:16].float(), weight)
    if module.bias is not None:
        expected = expected + module.bias.detach().float().reshape(expected.shape[1:])
    gap = output_rows(module, y.detach().float(), batch)[:16] - expected
    if not gap.isfinite().all():
        return True  # nothing can be said; the moments are not finite either
    return bool(gap.abs().max() <= TOLERANCE * expected.abs().max() + 1e-30) if gap.numel() else True
