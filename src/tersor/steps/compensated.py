"""Compensated: rounding=gptq, adaround and brecq of quantize. Each layer corrects what was rounded before it.

min (q - w') H (q - w')^T      w' the floats that fit best, H the second moment of inputs: layerwise.py
gptq       q on its grid                                                  maths/compensation.py
adaround   only the levels beside w'                                      maths/adaptive_rounding.py
brecq      then all layers of a block together                            blockwise.py
Layers whose inputs cannot be observed are rounded to the nearest and named.
Cost: that of the walk, and the sweeps of the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.encode import refine
from tersor.errors import few
from tersor.forms import Affine, Dense, Form
from tersor.forms.form import from_rows, to_rows
from tersor.maths.adaptive_rounding import adapted
from tersor.maths.compensation import OnGrid, Rows, compensated, nearest
from tersor.model.sites import Site
from tersor.record.events import Note
from tersor.steps.blockwise import Blockwise
from tersor.steps.layerwise import Layerwise, grouped


class Grids(NamedTuple):
    """The grids that weights are rounded to, and how."""

    rounding: str  # "gptq", "adaround" or "brecq"
    bits: int
    per: str
    group: int
    symmetric: bool
    range: str
    percentile: float
    ends: tuple[float, float] | None
    damp: float


@dataclass(kw_only=True)
class Compensated(Layerwise):
    """Rounded weights. `plain` rounds to the nearest."""

    grids: Grids
    blocks: Blockwise | None = None  # with brecq
    # Error of outputs, over that of the nearest, in decibels.
    gains: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)  # rows for which adaround is not better than nearest

    def begin(self, before: nn.Module, after: nn.Module, layers: Mapping[str, Site]) -> None:
        if self.blocks is not None:
            self.blocks.begin(before, after, layers)

    def reached(self, paths: Iterable[str]) -> None:
        if self.blocks is not None:
            self.blocks.reached(paths, self.forms, self.biases, self.gains)

    def fitted(self, site: Site, w: Tensor, h: Tensor, pull: Tensor) -> None:
        g, groups = self.grids, len(w)

        def store(_: Tensor, keep: Tensor | None, axis: int) -> Form:
            within = None if keep is None else grouped(to_rows(keep, axis), groups)
            rows = Rows.of(w.float(), h, within, damp=g.damp, who=f"quantize: {site.name}")
            search = g.range == "output"
            base = nearest(
                rows, g.bits, per=g.per, group=g.group, symmetric=g.symmetric,
                range="minmax" if search else g.range, percentile=g.percentile, ends=g.ends,
            )  # fmt: skip
            free = search or g.rounding != "adaround"
            made = compensated(rows, base, search=search) if free else base
            if g.rounding == "adaround":
                made, kept = adapted(rows, base, made, damp=g.damp)
                self.kept |= {site.name: kept} if kept else {}
            old, new = (float(rows.cost(each.decode()).sum()) for each in (base, made))
            self.gains[site.name] = round(10 * math.log10(old / new), 3) if new > 0 and old > 0 else 0.0
            return as_form(made, self.view.shape(site), axis)

        self.forms[site.name], self.hows[site.name] = refine(self.view.form(site), store, site.axis)

    def notes(self) -> Iterator[Note]:
        count = len(self.gains)
        mean = sum(self.gains.values()) / max(count, 1)
        done = "rounded up or down as learned" if self.grids.rounding == "adaround" else "compensated"
        text = f"{count} weight{'s' * (count != 1)} {done}"
        if count:
            text += f", error of outputs {mean:.1f} dB below nearest"
        if self.biases:
            text += f"; {len(self.biases)} bias{'es' * (len(self.biases) != 1)} corrected"
        if self.kept:
            text += "; outputs for which nothing better than the nearest was found: "
            text += few(f"{many} of {name}" for name, many in self.kept.items())
        if self.left:
            text += "; rounded to the nearest: " + few(f"{name} ({why})" for name, why in self.left.items())
        if self.thin:
            text += "; few samples, so that rounding may fit them alone; give more calibration batches: "
            text += few(f"{name} ({many})" for name, many in self.thin.items())
        facts = {"decibels": self.gains, "nearest": self.left, "few": self.thin}
        facts |= {"kept": self.kept} if self.kept else {}
        yield Note("", "compensated", text, facts)
        if self.blocks is not None:
            yield from self.blocks.notes()


def as_form(made: OnGrid, shape: tuple[int, ...], axis: int) -> Affine:
    codes = made.codes.flatten(0, 1).to(torch.int8 if made.bits <= 8 else torch.int16)
    scale = made.scale.reshape(-1, made.scale.shape[-1])
    kind = torch.int16 if made.bits <= 8 else torch.int32
    shift = None if made.zero is None else Dense(made.zero.reshape(scale.shape).to(kind))
    group = made.group if made.per == "group" else 0
    leaf = Dense(from_rows(codes, shape, axis).contiguous())
    return Affine(leaf, Dense(scale.contiguous()), shift, made.bits, group, axis)
