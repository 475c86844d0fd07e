"""Site rounding: rdoq's rounding of one site at a price of a bit, leaf by leaf of its form.

An error dW costs tr(F dW H dW^T). A leaf under a mask has the F and H of the masked tensor. In a product L R,
the left factor has F and R H R^T, the right one L^T F L and H.
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
SMALL = 1 << 16  # weights below which every way to share steps is tried; above, steps need hardly any bits
FAR = 8.0  # ratio of prices from which the ways to share steps are tried again
FEW = 16  # numbers that a grid does not shorten
BYTE = 127  # largest code in one byte
APART = 44  # bits of an outlier that is stored apart: its position and a float
APART_AT_ALL = 1600  # bits of the form that holds outliers
MORE = 4.0  # bits that each number of a bias, norm or position has more than a weight, without data

FINEST = 32.0  # bits a weight above which the price of a bit does not fall any further
LEAST = 1e-280  # of a price; 1 / LEAST is the most: beyond any error of floats


@dataclass(frozen=True, eq=False)
class LeafRounding:
    """One leaf's weights as rows, and the moments that weigh an error in them."""

    w: Tensor  # [O, I]
    keep: Tensor | None
    rows: Factor
    columns: Factor
    shape: tuple[int, ...]
    axis: int
    who: str  # for messages
    top: float  # the largest number of its dtype
    found: dict[str, Any] = field(default_factory=dict)  # results for earlier prices

    @property
    def vector(self) -> bool:
        return len(self.shape) <= 1

    def rounded(self, lam: float, per: str) -> Rounded:
        """The codes at this price. With per="auto", the steps with the least error + lam * bits."""
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
        """The ways to share steps that are tried. The best one is kept for prices nearby."""
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
        """The codes and steps as a form. If few codes exceed a byte, they are stored apart (SpQR, Dettmers
        2023): two bytes a code would cost every other code a bit."""
        beyond = made.codes.abs() > BYTE
        count = int(beyond.sum())
        if not count or APART * count + APART_AT_ALL > beyond.numel():
            return self.affine(made, made.codes)
        near = made.codes.clamp(-BYTE, BYTE)
        rest = (made.codes - near) * made.row * made.column
        apart = [Dense(from_rows(x, self.shape, self.axis).contiguous()) for x in (beyond, rest)]
        return Sum(self.affine(made, near), Masked(*apart))

    def affine(self, made: Rounded, codes: Tensor) -> Affine:
        """The codes with their steps. If rows and columns have steps, the scale is a product of the two."""
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
    """One site with everything that its rounding needs except the price."""

    site: Site
    before: Form
    how: str = "refine"
    leaves: list[LeafRounding] = field(default_factory=list)
    why: str = ""  # the reason for leaving it as it is

    @property
    def fits(self) -> bool:
        return not self.why

    @property
    def count(self) -> int:
        return sum(leaf.w.numel() for leaf in self.leaves)

    def price(self, bits: float) -> float:
        """Approximate price of a bit at which a weight gets this many bits."""
        powers = [
            float(leaf.rows.weight.log().mean() + leaf.columns.weight.log().mean())
            + math.log(mean_square(leaf.w) or 1.0)  # for zeros any price will do
            for leaf in self.leaves
        ]
        mean = sum(powers) / len(powers)
        return math.exp(min(max(mean, -600), 600)) * 12 * 4.0 ** -min(bits, FINEST) / THETA**2

    def bits(self, lam: float, per: str) -> float:
        return sum(leaf.rounded(lam, per).bits for leaf in self.leaves)

    def form(self, lam: float, per: str) -> tuple[Form, str, float]:
        """(the new form, how it treats the old one, bits of its codes)."""
        made = [leaf.rounded(lam, per) for leaf in self.leaves]
        forms = iter([leaf.form(codes) for leaf, codes in zip(self.leaves, made, strict=True)])
        after, how = refine(self.before, lambda w, keep, axis: next(forms), self.site.axis)
        return after, how, sum(codes.bits for codes in made)


def site_roundings(
    view: View, sites: list[Site], weigh: str, damp: float, passes: int = 1
) -> list[SiteRounding]:
    """A SiteRounding for each site, in the model's order."""
    found = moments(view, sites, weigh, passes)
    typical = torch.tensor(
        [power(view, site, *found[site.name]) for site in sites if site.name in found], dtype=torch.float64
    )
    level = float(typical[typical > 0].log().mean().exp()) if bool((typical > 0).any()) else 1.0
    return [site_rounding(view, site, found.get(site.name), level, damp) for site in sites]


def moments(view: View, sites: list[Site], weigh: str, passes: int) -> dict[str, Moments]:
    """(F, H) of each site whose curvature the data shows."""
    if weigh == "output":
        made = curvatures(view.plain(), view.task, sites, passes=passes)
        return {name: (c.rows, c.columns) for name, c in made.items()}
    if weigh == "inputs":
        grams = {site.name: view.gram(site) for site in sites if len(site.shape) > 1}
        return {name: scaled(view, name, gram) for name, gram in grams.items() if gram is not None}
    return {}


def mean_square(w: Tensor) -> float:
    """The mean of squares, without overflow or underflow of float32. 0 if there are no weights."""
    if not w.numel():
        return 0.0
    w = w.float().reshape(1, -1)
    power = exponent(w)
    return float(shift(w, -power).square().mean()) * 4.0 ** int(power)


def scaled(view: View, name: str, gram: Tensor) -> Moments:
    """Second moments in units of the layer's own output, so that layers can be compared."""
    w = to_rows(view.form(name).decode().float(), view.sites[name].axis)
    power, most = exponent(w.reshape(1, -1)), float(gram.abs().max()) or 1.0
    w = shift(w, -power)
    output = float(((w @ (gram / most)) * w).sum()) / max(w.numel(), 1) * 4.0 ** int(power) * most
    inside = 1e-30 < output < 1e30
    return None, (gram if inside else gram.double()) / max(output, LEAST)


def power(view: View, site: Site, rows: Tensor | None, columns: Tensor | None) -> float:
    """The cost of an error as large as the weights, on average over the weights."""
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
        made.why = f"{math.prod(before.shape)} numbers are too few for a grid"
        return made
    who = f"rdoq: {site.name}"
    form = uncoded(before)
    if found and site.axis and any(isinstance(node, LowRank) for _, node in form.walk()):
        # A product is split along its first axis, also if outputs are on another axis.
        found = found[::-1] if len(site.shape) == 2 else (None, None)
    sides = leaf_moments(form, *found) if found else iter([(None, None)] * len(shapes))
    for (w, keep, axis), (rows, columns) in zip(shapes, sides, strict=True):
        flat = to_rows(w.float(), axis).contiguous()
        outs, ins = flat.shape
        if not fits(rows, outs) or not fits(columns, ins):
            rows = columns = None  # factors of a product whose rows are not those of the whole tensor
        if rows is None and columns is None:
            weight = 1.0 if site.is_weight else 4.0**MORE
            columns = torch.full((ins,), weight * level / (mean_square(flat) or level), dtype=torch.float64)
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
    """The largest float32 that rounds to a finite number of the dtype. Decoding computes in float32, and
    rounding goes down to the dtype's largest number for half a step above it."""
    info = torch.finfo(dtype)
    return min(info.max * (1 + info.eps / 8), HUGE)


def fits(moment: Tensor | None, count: int) -> bool:
    return moment is None or moment.shape[0] == count


def leaf_moments(form: Form, rows: Tensor | None, columns: Tensor | None) -> Iterator[Moments]:
    """(F, H) of each leaf, in the order in which refine visits them."""
    if not form.inner:
        yield rows, columns
    for key, moments in zip(form.inner, form.weigh(rows, columns), strict=True):
        yield from leaf_moments(form.children()[key], *moments)
