"""Grids: how one site is rounded at a price, leaf by leaf of its form: what rdoq works with.

dW of a leaf weighs tr(F dW H dW^T): under a mask as above it; of a product left * right the left factor has
    F, R H R^T and the right one L^T F L, H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersor.core.view import View
from tersor.encode import refine
from tersor.forms import Affine, Dense, Form, LowRank, Masked, Sum, uncoded
from tersor.forms.form import Moments, from_rows, to_rows
from tersor.maths.rate_distortion import THETA, Factor, Rounded, factor, rdoq, steps
from tersor.maths.units import HUGE, exponent, shift
from tersor.model.curvature import curvatures
from tersor.model.sites import Site

PER = ("tensor", "channel", "input", "both")
SMALL = 1 << 16  # weights below which all ways to share steps are tried; above, steps cost next to nothing
FAR = 8.0  # times a price: from there on the ways are tried anew
FEW = 16  # numbers that are not worth a grid
BYTE = 127  # largest code in one byte
APART = 44  # bits of a code stored apart: where it is, and a float
APART_AT_ALL = 1600  # bits of the form around them
MORE = (
    4.0  # bits a number that a bias, norm or position has beyond a weight, where nothing is known of either
)

FINEST = 32.0  # bits a weight from which the price of a bit is not reckoned any lower
LEAST = 1e-280  # of a price, and 1 / LEAST the most: beyond any error of floats


@dataclass(frozen=True, eq=False)
class LeafRounding:
    """One leaf's weights as rows, and what an error in them weighs."""

    w: Tensor  # [O, I]
    keep: Tensor | None
    rows: Factor
    columns: Factor
    shape: tuple[int, ...]
    axis: int
    who: str  # for messages
    top: float  # the largest number that is one of its dtype
    found: dict[str, Any] = field(default_factory=dict)  # what earlier prices gave

    @property
    def vector(self) -> bool:
        return len(self.shape) <= 1

    def rounded(self, lam: float, per: str) -> Rounded:
        """The codes at this price; with per="auto" the steps whose error + lam * bits is least."""
        lam = min(max(lam, LEAST), 1 / LEAST)
        if self.found.get("last", (None, None))[:2] != (lam, per):
            tried = {word: self.shared(lam, word) for word in self.choice(lam, per)}
            best = min(tried, key=lambda word: tried[word].error + lam * tried[word].bits)
            if len(tried) > 1:
                self.found["best"] = (lam, best)
            self.found["last"] = (lam, per, tried[best])
        made: Rounded = self.found["last"][2]
        return made

    def choice(self, lam: float, per: str) -> tuple[str, ...]:
        """What may share a step; what was found best is kept for prices that are not far away."""
        if self.vector:
            return ("tensor",)
        if per != "auto":
            return (per,)
        if self.w.numel() >= SMALL:
            return ("both",)
        at, best = self.found.get("best", (0.0, ""))
        return (best,) if best and 1 / FAR < lam / at < FAR else PER

    def shared(self, lam: float, per: str) -> Rounded:
        row, column = steps(self.rows, self.columns, lam, per)
        return rdoq(
            self.w, self.rows, self.columns, lam, row=row, column=column, keep=self.keep, top=self.top,
            who=self.who,
        )  # fmt: skip

    def form(self, made: Rounded) -> Form:
        """The codes and steps as a form. A few codes beyond a byte are stored apart (as SpQR does, Dettmers
        2023): two bytes a code would cost all the others a bit."""
        beyond = made.codes.abs() > BYTE
        count = int(beyond.sum())
        if not count or APART * count + APART_AT_ALL > beyond.numel():
            return self.affine(made, made.codes)
        near = made.codes.clamp(-BYTE, BYTE)
        rest = (made.codes - near) * made.row * made.column
        apart = [Dense(from_rows(x, self.shape, self.axis).contiguous()) for x in (beyond, rest)]
        return Sum(self.affine(made, near), Masked(*apart))

    def affine(self, made: Rounded, codes: Tensor) -> Affine:
        """Two steps a weight are a product of one column and one row."""
        most = int(codes.abs().max()) if codes.numel() else 0
        bits = max(2, most.bit_length() + 1)
        small = codes.to(torch.int8 if bits <= 8 else torch.int16)
        stored = Dense(from_rows(small, self.shape, self.axis).contiguous())
        if made.column.numel() == 1:
            return Affine(stored, Dense((made.row * made.column).contiguous()), None, bits, 0, self.axis)
        row = made.row.expand(self.w.shape[0], 1).contiguous()
        return Affine(stored, LowRank(Dense(row), Dense(made.column)), None, bits, 1, self.axis)


@dataclass
class SiteRounding:
    """All there is to know of one site before a price is named."""

    site: Site
    before: Form
    how: str = "refine"
    leaves: list[LeafRounding] = field(default_factory=list)
    why: str = ""  # it is left as it is

    @property
    def fits(self) -> bool:
        return not self.why

    @property
    def count(self) -> int:
        return sum(leaf.w.numel() for leaf in self.leaves)

    def price(self, bits: float) -> float:
        """About what a bit is worth where a weight has so many."""
        powers = [
            float(leaf.rows.weight.log().mean() + leaf.columns.weight.log().mean())
            + math.log(mean_square(leaf.w) or 1.0)  # of zeros any price will do
            for leaf in self.leaves
        ]
        mean = sum(powers) / len(powers)
        return math.exp(min(max(mean, -600), 600)) * 12 * 4.0 ** -min(bits, FINEST) / THETA**2

    def bits(self, lam: float, per: str) -> float:
        return sum(leaf.rounded(lam, per).bits for leaf in self.leaves)

    def form(self, lam: float, per: str) -> tuple[Form, str, float]:
        """(the new form, how it treats the old one, bits of its codes)."""
        made = [leaf.rounded(lam, per) for leaf in self.leaves]
        forms = iter([leaf.form(one) for leaf, one in zip(self.leaves, made, strict=True)])
        after, how = refine(self.before, lambda w, keep, axis: next(forms), self.site.axis)
        return after, how, sum(one.bits for one in made)


def site_roundings(
    view: View, sites: list[Site], weigh: str, damp: float, passes: int = 1
) -> list[SiteRounding]:
    """A plan for each site, in the model's order."""
    found = moments(view, sites, weigh, passes)
    typical = torch.tensor(
        [power(view, site, *found[site.name]) for site in sites if site.name in found], dtype=torch.float64
    )
    level = float(typical[typical > 0].log().mean().exp()) if bool((typical > 0).any()) else 1.0
    return [site_rounding(view, site, found.get(site.name), level, damp) for site in sites]


def moments(view: View, sites: list[Site], weigh: str, passes: int) -> dict[str, Moments]:
    """The curvature of each site that the data shows."""
    if weigh == "output":
        made = curvatures(view.plain(), view.task, sites, passes=passes)
        return {name: (one.rows, one.columns) for name, one in made.items()}
    if weigh == "inputs":
        grams = {site.name: view.gram(site) for site in sites if len(site.shape) > 1}
        return {name: scaled(view, name, gram) for name, gram in grams.items() if gram is not None}
    return {}


def mean_square(w: Tensor) -> float:
    """The mean of squares, which of large or small float32 are none. 0 of no weights."""
    if not w.numel():
        return 0.0
    w = w.float().reshape(1, -1)
    power = exponent(w)
    return float(shift(w, -power).square().mean()) * 4.0 ** int(power)


def scaled(view: View, name: str, gram: Tensor) -> Moments:
    """Second moments in units of the layer's own output, so that layers compare."""
    w = to_rows(view.form(name).decode().float(), view.sites[name].axis)
    power, most = exponent(w.reshape(1, -1)), float(gram.abs().max()) or 1.0
    w = shift(w, -power)
    output = float(((w @ (gram / most)) * w).sum()) / max(w.numel(), 1) * 4.0 ** int(power) * most
    inside = 1e-30 < output < 1e30
    return None, (gram if inside else gram.double()) / max(output, LEAST)


def power(view: View, site: Site, rows: Tensor | None, columns: Tensor | None) -> float:
    """What an error as large as the weights themselves would weigh, on average over the weights."""
    parts = [
        1.0 if m is None else float((m.diagonal() if m.ndim == 2 else m).double().mean())
        for m in (rows, columns)
    ]
    return parts[0] * parts[1] * mean_square(view.form(site).decode())


def site_rounding(view: View, site: Site, found: Moments | None, level: float, damp: float) -> SiteRounding:
    before = view.form(site)
    made = SiteRounding(site, before)
    shapes: list[tuple[Tensor, Tensor | None, int]] = []

    def collect(w: Tensor, keep: Tensor | None, axis: int) -> Form:
        shapes.append((w, keep, axis))
        return Dense(w)

    made.how = refine(before, collect, site.axis)[1]
    if not site.is_weight and math.prod(before.shape) < FEW:
        made.why = f"{math.prod(before.shape)} numbers are not worth a grid"
        return made
    who = f"rdoq: {site.name}"
    form = uncoded(before)
    if found and site.axis and any(isinstance(node, LowRank) for _, node in form.walk()):
        # A product is split along its first axis, whatever the axis of outputs.
        found = found[::-1] if len(site.shape) == 2 else (None, None)
    sides = leaf_moments(form, *found) if found else iter([(None, None)] * len(shapes))
    for (w, keep, axis), (rows, columns) in zip(shapes, sides, strict=True):
        flat = to_rows(w.float(), axis).contiguous()
        outs, ins = flat.shape
        if not fits(rows, outs) or not fits(columns, ins):
            rows = columns = None  # a product's factors that do not lie along the rows of the whole
        if rows is None and columns is None:
            dear = 1.0 if site.is_weight else 4.0**MORE
            columns = torch.full((ins,), dear * level / (mean_square(flat) or level), dtype=torch.float64)
        kept = None if keep is None else to_rows(keep, axis)
        made.leaves.append(
            LeafRounding(
                flat,
                kept,
                factor(rows, outs, damp=damp, who=who),
                factor(columns, ins, damp=damp, who=who),
                tuple(w.shape),
                axis,
                who,
                largest_of(w.dtype),
            )
        )
    return made


def largest_of(dtype: torch.dtype) -> float:
    """Beyond its largest number a dtype rounds down for half a step; decoded is in float32."""
    info = torch.finfo(dtype)
    return min(info.max * (1 + info.eps / 8), HUGE)


def fits(moment: Tensor | None, count: int) -> bool:
    return moment is None or moment.shape[0] == count


def leaf_moments(form: Form, rows: Tensor | None, columns: Tensor | None) -> Iterator[Moments]:
    """F and H of each leaf, in the order in which refine visits them."""
    if not form.inner:
        yield rows, columns
    for key, moments in zip(form.inner, form.weigh(rows, columns), strict=True):
        yield from leaf_moments(form.children()[key], *moments)
