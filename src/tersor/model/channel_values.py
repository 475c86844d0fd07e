"""Channel values: range, mean, mean square of each channel on named edges, over the calibration batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.observe import Ranges
from tersor.model.task import Task
from tersor.model.watch import hooked, running


class ChannelValues(NamedTuple):
    """Of one edge, float64 [C]. The range contains 0."""

    low: Tensor
    high: Tensor
    mean: Tensor
    power: Tensor  # mean square


class ChannelRun(Ranges):
    """A run that keeps the values of channels along an axis of each named edge."""

    def __init__(self, axes: Mapping[str, int], pair: bool):
        super().__init__((), None, pair=pair)
        self.axes, self.wanted = axes, frozenset(axes)
        self.ends: dict[str, tuple[Tensor, Tensor]] = {}
        self.sums: dict[str, Tensor] = {}  # of values and of squares, [2, C]
        self.counts: dict[str, int] = {}

    def observe(self, name: str, x: Tensor) -> Tensor:
        if name not in self.axes or not x.numel():
            return x
        values, tokens = x.detach().movedim(self.axes[name], -1), self.tokens(name, x)
        values = values.reshape(-1, values.shape[-1]) if tokens is None else values[tokens]  # [N, C]
        if not len(values):
            return x
        low, high = values.amin(0).double().clamp_max(0), values.amax(0).double().clamp_min(0)
        if name in self.ends:
            low, high = torch.minimum(low, self.ends[name][0]), torch.maximum(high, self.ends[name][1])
        self.ends[name] = low, high
        both = torch.stack([values.float().mean(0), values.float().square().mean(0)]).double()
        self.sums[name] = self.sums.get(name, 0) + both * len(values)
        self.counts[name] = self.counts.get(name, 0) + len(values)
        return x


def channel_values(model: nn.Module, task: Task, axes: Mapping[str, int]) -> dict[str, ChannelValues]:
    """`axes`: name of an edge -> the axis of its channels. Edges that no batch reaches, or that hold NaN or
    infinity, are left out."""
    net = hooked(copy.deepcopy(model))
    run = ChannelRun(axes, bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False)))
    with torch.no_grad(), evaluating(net), steady(task.calibrate):
        for batch in task.batches("calibrate"):
            run.batch = move(batch, device_of(net))
            with running(run):
                task.answer(net, run.batch)
    found = {
        name: ChannelValues(low.cpu(), high.cpu(), *(run.sums[name] / run.counts[name]).cpu())
        for name, (low, high) in run.ends.items()
    }
    return {name: v for name, v in found.items() if all(bool(x.isfinite().all()) for x in v)}
