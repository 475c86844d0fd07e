"""Lockstep: how far the mean of each layer's outputs moves when a model computes with integers.

shift[c] = mean(y_c) - mean(y'_c)   y of the model before, y' of the one on grids, whose earlier layers have
                                    their shifts already (bias correction, Nagel 2019, section 4.2)
kept     = shift^3 / (shift^2 + error^2)      of few samples a mean is uncertain: error, its standard error
Both models run over each calibration batch once, and each layer's shift is added to its outputs at once, so
the layers behind it see them. A sample's error is the mean over its positions. Padding tokens do not count.
Cost: two passes over the calibration batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.forms.grid import Grid
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.observe import Ranges
from tersor.model.simulate import Simulated
from tersor.model.task import Task
from tersor.model.watch import hooked, running


class Means(Ranges):
    """A run that keeps the mean of each sample on the named edges, [B, C]; of each channel along an axis."""

    def __init__(self, axes: Mapping[str, int], pair: bool):
        super().__init__((), None, pair=pair)
        self.axes, self.wanted = axes, frozenset(axes)
        self.means: dict[str, Tensor] = {}
        self.several: set[str] = set()  # edges that one forward makes more than once

    def observe(self, name: str, x: Tensor) -> Tensor:
        if name in self.axes:
            if name in self.means:
                self.several.add(name)
            self.means[name] = sample_means(x, self.axes[name], self.tokens(name, x))
        return x


def sample_means(x: Tensor, axis: int, tokens: Tensor | None) -> Tensor:
    """[B, C] of x with samples on axis 0; `tokens`: bool [B, T], False for padding."""
    x = x.detach().double().movedim(axis, -1)
    x = x[:, None] if x.ndim == 2 else x.flatten(1, -2)  # [B, positions, C]
    if tokens is None or tokens.shape != x.shape[:2]:
        return x.mean(1).cpu()
    count = tokens.sum(1, keepdim=True).clamp_min(1)
    return ((x * tokens[..., None]).sum(1) / count).cpu()


class Shifted(Simulated):
    """A model on grids, whose named edges are moved to the means of another."""

    def __init__(self, model: nn.Module, grids: Mapping[str, Grid], means: Means):
        super().__init__(model, grids)
        self.given, self.errors = means, dict[str, Tensor]()  # [N, C] of all samples so far

    def see(self, name: str, x: Tensor) -> Tensor:
        if name in self.given.means and name not in self.given.several:
            axis = self.given.axes[name]
            gap = self.given.means[name] - sample_means(x, axis, self.given.tokens(name, x))
            before = self.errors.get(name)
            self.errors[name] = gap if before is None else torch.cat([before, gap])
            c = certain(self.errors[name]).to(x)
            x = x + c.reshape([-1 if at == axis % x.ndim else 1 for at in range(x.ndim)])
        return super().see(name, x)


def certain(errors: Tensor) -> Tensor:
    """The mean of errors [N, C] without what may be chance, [C]."""
    mean = errors.mean(0)
    if len(errors) < 2:
        return mean
    chance = errors.var(0) / len(errors)
    return mean * mean.square() / (mean.square() + chance).clamp_min(1e-300)


def shifts(
    before: nn.Module, after: nn.Module, task: Task, grids: Mapping[str, Grid], axes: Mapping[str, int]
) -> tuple[dict[str, Tensor], set[str]]:
    """(the shift of each edge [C], float64; edges without one, since a forward makes them several times).
    `axes`: name of an edge -> the axis of its channels. Both models are private copies."""
    net = hooked(copy.deepcopy(before))
    pair = bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False))
    means = Means(axes, pair)
    moved = Shifted(after, grids, means).requires_grad_(False)
    with torch.no_grad(), evaluating(net), evaluating(moved), steady(task.calibrate):
        for batch in task.batches("calibrate"):
            means.batch = move(batch, device_of(net))
            means.means.clear()
            with running(means):
                task.answer(net, means.batch)
            task.answer(moved, means.batch)
    return {name: certain(e) for name, e in moved.errors.items() if name not in means.several}, means.several
