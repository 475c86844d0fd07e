"""Saturated: what a network of integers computes on processors without VNNI, simulated: model/saturation.py.

warned    a note of quantize, if outputs of a few calibration samples move there by more than a hundredth, and
          by more than rounding moved them
scored    the metric of measure, with saturate=true
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.core.view import View
from tersor.errors import counted, few
from tersor.model.batches import device_of, move, steady
from tersor.model.integer_weights import integer_weight
from tersor.model.saturation import Saturated, pairs_of
from tersor.record.events import Note
from tersor.steps.activations import choice
from tersor.steps.drop_search import Part

SAMPLES = 4
MOVED = 0.01  # of the outputs' size: less is no more than what rounding does
WHERE = "on processors without VNNI instructions"


def saturated(view: View) -> tuple[Saturated, list[str]]:
    """(the simulation, the weights that it leaves exact because their operators are not simulated)."""
    forms = {name: integer_weight(form) for name, form in view.forms.items()}
    weights = {name: weight for name, weight in forms.items() if not isinstance(weight, str)}
    grids = view.state.grids
    moving = any(grid.scale is None for grid in grids.values())
    layers = [layer for layer in choice(view, {*weights}, dynamic=moving).layers if layer.edge in grids]
    pairs, left = pairs_of(layers, weights, grids)
    net = Saturated(view.plain(), grids, pairs)
    return net.requires_grad_(False).eval(), left


class Moved:
    """How far outputs move, root mean square, as a share of their size."""

    loss = size = 0.0

    def add(self, found: list[Tensor], exact: list[Tensor]) -> None:
        for a, b in zip(found, exact, strict=True):
            self.loss += float((a - b).square().sum())
            self.size += float(b.square().sum())

    @property
    def share(self) -> float:
        return math.sqrt(self.loss / self.size) if self.size else 0.0


def warned(view: View, floats: View) -> Iterator[Note]:
    """A note if outputs move there by more than MOVED, and by more than rounding moved those of `floats`."""
    net, left = saturated(view)
    if not net.pairs:
        return
    exact, plain = view.model().eval(), floats.plain().eval()
    moved, rounded = Moved(), Moved()
    with steady(view.task.calibrate), torch.no_grad():
        for batch in Part(view.task, "calibrate", most=SAMPLES):
            given = move(batch, device_of(exact))
            now = answered(view, exact, given)
            moved.add(answered(view, net, given), now)
            rounded.add(now, answered(view, plain, given))
    clipped = {edge: pair.clipped / pair.seen for edge, pair in net.pairs.items() if pair.clipped}
    if moved.share <= max(MOVED, rounded.share):
        return
    worst = sorted(clipped.items(), key=lambda item: -item[1])
    text = (
        f"{WHERE} sums of two products exceed 16 bits in {counted(len(clipped), 'layer')}, and outputs move "
        f"by {percent(moved.share)} of their size (rounding: {percent(rounded.share)}): "
        + few(f"{edge} {percent(share)} of the sums" for edge, share in worst)
        + (f"; not simulated: {few(left)}" if left else "")
        + ". Give bits=7 for them"
    )
    yield Note("", "saturation", text, {"moved": moved.share, "rounded": rounded.share, "clipped": clipped})


def scored(view: View) -> Note:
    """The metric there, beside the exact one."""
    from tersor.measure.accuracy import compared, in_words, named

    if not view.state.grids:
        why = "no edge has a grid, so nothing computes with integers"
        return Note("", "skipped", f"saturation is not simulated: {why}")
    net, left = saturated(view)
    task, metric = view.task, view.task.scored
    found = compared(task.scores(view.model()), task.scores(net), metric)
    text = f"{WHERE} {in_words(found)} (p = {found['p']:.3g})"
    text += f"; not simulated: {few(left)}" if left else ""
    return Note("", "saturation", text, found | {"left": left, **named(metric)})


def answered(view: View, net: nn.Module, batch: Any) -> list[Tensor]:
    """The floating outputs of a model for a batch."""
    found = tree_leaves(view.task.answer(net, batch))
    return [leaf.double() for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
