"""Blockwise: rounding=brecq of quantize. The layers of a block are rounded together once each is compensated.

gptq     each layer of a block, on what the network rounded so far gives it                 compensated.py
then     the codes, scales and biases of all of them, by the block's float output           joint_rounding.py
kept     whichever of the two has the smaller error of the block's output on the calibration data
With activations=8 the grids of edges round inside the block. Layers in no block of two or more, and blocks
that cannot run alone, keep the first rounding and are named. Memory: block_calls.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tersor.core.view import View
from tersor.errors import RefusedError, few
from tersor.forms import At, Dense, Form, uncoded
from tersor.forms.grid import Grid
from tersor.model.batches import device_of, move
from tersor.model.block_calls import block_calls
from tersor.model.blocks import Block, blocks_of
from tersor.model.example import example_inputs
from tersor.model.graph import Graph, traced
from tersor.model.joint_rounding import JointRounding
from tersor.model.layer_moments import calls_of
from tersor.model.rounding_part import RoundingPart
from tersor.model.simulate import Simulated
from tersor.model.sites import Site
from tersor.model.trainable_parts import DensePart, Part, part
from tersor.record.events import Note


@dataclass
class Blockwise:
    """What blocks there are, and what came of them."""

    view: View
    grids: Mapping[str, Grid]  # on edges, as activations will be rounded
    gains: dict[str, float] = field(default_factory=dict)  # error of the block's output, decibels below gptq
    kept: list[str] = field(default_factory=list)  # blocks for which gptq is better
    left: dict[str, str] = field(default_factory=dict)  # blocks that are not learned: why
    thin: dict[str, int] = field(default_factory=dict)  # blocks without room for so many batches
    alone: list[str] = field(default_factory=list)  # layers in no block
    untraced: str = ""  # why no residual blocks are known

    def begin(self, before: nn.Module, after: nn.Module, layers: Mapping[str, Site]) -> None:
        """`before`, `after`: the float network and the one that is being rounded, private copies. `layers`:
        those that are rounded, by their paths."""
        self.before, self.after, self.layers = before, after.requires_grad_(False), layers
        self.simulated = Simulated(after, self.grids).requires_grad_(False) if self.grids else None
        tied = {*self.view.state.aliases, *self.view.state.aliases.values()}
        self.open = blocks_of(before, self.graph(), list(layers), tied)
        self.alone = [path for path in layers if not any(path in block.layers for block in self.open)]
        ends = {path for block in self.open for path in (block.modules[0], block.modules[-1])}
        found = calls_of(before, self.view.task, ends)
        self.calls = {path: count for together in found for path, count in together.items()}
        self.rounded: set[str] = set()

    def graph(self) -> Graph | None:
        part = self.view.part
        model = part.plain()
        try:
            return traced(model, move(example_inputs(part.task, model), device_of(model)))
        except RefusedError as error:
            self.untraced = str(error)
            return None

    def reached(
        self, paths: Iterable[str], forms: dict[str, Form], biases: Mapping[str, float], done: Iterable[str]
    ) -> None:
        """These layers were compensated. Learn each block that is complete now, into `forms`. `biases`: those
        that may change, with the spread of their layer's outputs; `done`: sites that were compensated."""
        self.rounded.update(paths)
        for block in [each for each in self.open if self.rounded.issuperset(each.layers)]:
            self.open.remove(block)
            names = [self.layers[path].name for path in block.layers]
            if outside := [name for name in names if name not in done]:
                self.left[block.name] = f"{outside[0]} is rounded to the nearest"
            elif any(self.calls.get(path) != 1 for path in (block.modules[0], block.modules[-1])):
                self.left[block.name] = "it is called several times"
            else:
                self.learn(block, names, forms, biases)

    def learn(
        self, block: Block, names: list[str], forms: dict[str, Form], biases: Mapping[str, float]
    ) -> None:
        runs = self.simulated or self.after
        found = block_calls(block, self.before, runs, (self.before, self.after), self.view.task)
        if isinstance(found, str):
            self.left[block.name] = found
            return
        if found.left_out:
            self.thin[block.name] = found.left_out
        mine = {self.view.sites[name].layer for name in names}
        shifts = {name: spread for name, spread in biases.items() if name.rpartition(".")[0] in mine}
        parts: dict[str, Part] = {name: self.soft(name, forms[name]) for name in names}
        parts |= {name: DensePart(dense(forms[name])) for name in shifts}
        for each in parts.values():
            each.to(device_of(self.after))
        joint = JointRounding(
            block.of(self.after), {block.inner(name): each for name, each in parts.items()},
            {block.inner(name): spread for name, spread in shifts.items()}, found.chunks, self.simulated,
        )  # fmt: skip
        if not joint.differentiable():
            self.left[block.name] = "no gradients pass through it"
            return
        old, new = joint.run(self.view.seed_for(f"block {block.name}"))
        if not new < old:
            self.kept.append(block.name)
            return
        self.gains[block.name] = round(10 * math.log10(old / new), 3) if new > 0 else 0.0
        parameters = dict(self.after.named_parameters())
        for name, each in parts.items():
            forms[name] = each.fold()
            with torch.no_grad():
                parameters[name].copy_(forms[name].decode())

    def soft(self, name: str, form: Form) -> Part:
        made = part(At(uncoded(form), self.view.sites[name].axis), RoundingPart)
        made.begin(uncoded(self.view.form(name)))
        return made

    def notes(self) -> Iterator[Note]:
        count = len(self.gains)
        mean = sum(self.gains.values()) / max(count, 1)
        text = f"{count} block{'s' * (count != 1)} rounded together"
        text += f", error of their outputs {mean:.1f} dB below gptq" if count else ""
        parts: list[tuple[str, list[Any]]] = [
            ("gptq is better for", self.kept),
            ("not together", [f"{name} ({why})" for name, why in self.left.items()]),
            ("in no block", self.alone),
            ("no room for batches of", [f"{name} ({many})" for name, many in self.thin.items()]),
        ]
        text += "".join(f"; {what}: {few(some)}" for what, some in parts if some)
        text += f"; residual blocks are not known: {self.untraced}" if self.untraced else ""
        facts: dict[str, Any] = {"decibels": self.gains, "kept": self.kept, "left": self.left}
        facts |= {"alone": self.alone} | ({"thin": self.thin} if self.thin else {})
        yield Note("", "blocks", text, facts)


def dense(form: Form) -> Dense:
    plain = uncoded(form)
    return plain if isinstance(plain, Dense) else Dense(plain.decode())
