"""Quantize: store each weight as a small integer, or as a 16-bit float.

uniform    w ~ (codes - zero) * scale       1 to 16 bits; range by min-max, percentile, least squares, entropy
log        w ~ sign * 2^-k * scale          powers of two (Miyashita 2016), or sums of two (APoT, Li 2020)
binary     w ~ +-scale                      Rastegari 2016
ternary    w ~ {-1, 0, 1} * scale           Li 2016 (TWN)
float16    w ~ sign * 2^e * 1.m             10 bits of m, up to 65,504; bfloat16: 7 bits, the range of float32
stored     bits a weight before coding, 32 bits a scale
rounding   to the nearest, or gptq and adaround: by the error of each layer's outputs: steps/compensated.py;
           brecq: by that of each block's: steps/blockwise.py;
           or auto: the first of these that keeps the metric: steps/rounding_search.py
activations=8 or 16 also rounds what layers read, as integer kernels do: steps/activations.py. It needs data,
except with activation_range=dynamic, where the range of each tensor is taken when the model runs; LSTMs
compute with integers only then.
Weights alone, rounded to the nearest, need none. With epochs it trains through the grid by straight-through
gradients (Bengio 2013), and learns the steps of uniform grids (LSQ, Esser 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.dtypes import HALVES
from tersor.encode import refine
from tersor.errors import RefusedError, SettingError, counted
from tersor.forms import Affine, Codebook, Dense, Form, LogGrid
from tersor.forms.form import from_rows, to_rows
from tersor.forms.grid import Grid
from tersor.maths.levels import LOG_RANGES, log_grid
from tersor.maths.signs import binary, ternary
from tersor.maths.uniform_grid import PER, RANGES, uniform_grid
from tersor.model.observe import RANGES as ACTIVATION_RANGES
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import GIVEN, LEFT_OUT, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.activations import check_weights
from tersor.steps.awq import activation_aware
from tersor.steps.blockwise import Blockwise
from tersor.steps.compensated import Compensated, Grids
from tersor.steps.few_bits import advice
from tersor.steps.integers import DYNAMIC, integers
from tersor.steps.mixed_bits import check_allowed, mixed
from tersor.steps.retrain import Retrain
from tersor.steps.rounded_note import rounded_note
from tersor.steps.rounding_search import WAYS, check_way, searched

SCHEMES = ("uniform", "log", "binary", "ternary", *HALVES)
ROUNDING = (*WAYS, "auto")
BY_OUTPUTS = WAYS[1:]  # those that need calibration batches
PRODUCTS = ("float", "integer")


@dataclass(frozen=True, kw_only=True)
class Quantize(Retrain):
    """Store weights in few bits: uniform grids, powers of two, binary, ternary, or 16-bit floats."""

    name: ClassVar[str] = "quantize"
    only: ClassVar[Only] = {
        "bits": {"scheme": ("uniform", "log"), "allowed": LEFT_OUT},
        "allowed": {"scheme": ("uniform", "log"), "activations": (0,), "rounding": ("nearest",)},
        "mean_bits": {"allowed": GIVEN, "max_drop": LEFT_OUT},
        "max_drop": {"mean_bits": LEFT_OUT},  # and allowed or rounding=auto: check_way
        "per": {"scheme": ("uniform", "log", "binary", "ternary")},
        "group": {"per": ("group",)},
        "symmetric": {"scheme": ("uniform",)},
        "range": {"scheme": ("uniform", "log")},
        "percentile": {"range": ("percentile",)},
        "rounding": {"scheme": ("uniform",), "epochs": (0,)},  # training begins at the exact weights
        "damp": {"rounding": BY_OUTPUTS},
        "low": {"range": ("fixed",), "symmetric": (False,)},
        "high": {"range": ("fixed",)},
        "terms": {"scheme": ("log",)},
        "rule": {"scheme": ("ternary",)},
        "activation_range": {"activations": (8, 16)},
        "activation_percentile": {"activation_range": ("percentile",)},
        "smooth": {"activations": (8, 16)},
        "balance": {"activations": (8, 16), "activation_range": (*ACTIVATION_RANGES,)},
        "correct": {"activations": (8, 16), "activation_range": (*ACTIVATION_RANGES,), "epochs": (0,)},
        "awq": {"activations": (0,), "scheme": ("uniform",), "epochs": (0,), "allowed": LEFT_OUT},
        "products": {"activations": (8, 16), "activation_range": (*ACTIVATION_RANGES,)},
    }
    scheme: str = "uniform"  # "uniform", "log", "binary" or "ternary"; "float16" or "bfloat16"
    bits: int = 8  # bits a weight: 1 to 16 uniform, 2 to 8 log
    allowed: str | None = None  # bits that a layer may have, as "8,4": each gets those that its errors need
    mean_bits: float | None = None  # of all weights, with `allowed`; by default midway between the ends
    # With `allowed` or rounding=auto: loss of the metric, searched on calibration or training batches. With
    # `allowed`, layers may stay floats.
    max_drop: float | None = None
    per: str = "channel"  # what shares a scale: "tensor", "channel" (an output channel) or "group"
    group: int = 64  # inputs that share a scale, if per is "group"
    symmetric: bool = True  # no zero point
    # How a grid's ends are found: "minmax" or "mse"; for uniform grids also "percentile", "entropy", "fixed";
    # with rounding=gptq, adaround or brecq "output". auto: that, or minmax.
    range: str = "auto"
    percentile: float = 99.9  # of |w| inside the grid, if range is "percentile"
    low: float | None = None  # the grid's ends if range is "fixed"; a symmetric one begins at -high
    high: float | None = None
    # How weights are rounded to uniform grids: to the "nearest"; "gptq": so that outputs change least;
    # "adaround": the same, but only to the levels beside each weight; "brecq": so that outputs of blocks of
    # layers change least; "auto": the first within max_drop.
    rounding: str = "nearest"
    damp: float = 0.01  # share of the mean curvature added to it, for inputs that the data did not show
    terms: int = 1  # powers of two in a log level: 1 or 2
    # Bits of activations: 0 leaves them in float, 8 is for kernels that compute with integers, 16 for
    # accelerators that have such kernels.
    activations: int = 0
    # How the range of activations is found: "minmax", "average", "percentile", "mse" or "entropy" from
    # calibration batches, or "dynamic": anew for each tensor when the model runs, which LSTMs need.
    activation_range: str = "minmax"
    activation_percentile: float = 99.99  # of the values inside, if activation_range is "percentile"
    # Multiply inputs of linear layers, where outliers would need coarse steps. It needs calibration batches.
    smooth: bool = True
    # Scale the channels between layers, so that one grid fits all of them. It changes no operator.
    balance: bool = True
    # Move biases by how far rounding moves the means of outputs, by calibration batches.
    correct: bool = True
    # As `smooth`, for weights alone: those of large inputs get finer steps, by calibration batches.
    awq: bool = False
    products: str = "float"  # of two activations, as in attention: "integer" or "float"
    rule: str = "twn"  # ternary threshold: "twn" (0.7 * mean |w|) or "exact" (least squares)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "scheme", SCHEMES)
        check_word(self, "per", ("tensor", "channel") if self.scheme in ("binary", "ternary") else PER)
        check_word(self, "range", ("auto", *(LOG_RANGES if self.scheme == "log" else (*RANGES, "output"))))
        check_word(self, "rounding", ROUNDING)
        check(0 < self.damp <= 1, self, "damp", "it is a share: 0 < damp <= 1")
        if self.range == "output" and self.rounding not in BY_OUTPUTS:
            raise SettingError(
                f"quantize: range='output' with rounding={self.rounding!r}, but the error of outputs is "
                "known to rounding=gptq, adaround and brecq alone. Give one of them, or range=mse"
            )
        check_word(self, "rule", ("twn", "exact"))
        low, high = (2, 8) if self.scheme == "log" else (1, 16)
        check(low <= self.bits <= high, self, "bits", f"{self.scheme} stores {low} to {high}")
        if self.scheme == "uniform" and self.bits == 1 and self.symmetric:
            raise SettingError(
                "quantize: bits=1 has no symmetric uniform grid. Use scheme=binary (two levels around 0), "
                "or symmetric=false (0 and one end)."
            )
        check_allowed(self, low, high)
        check(self.group >= 1, self, "group", "it is a number of weights: 1 or more")
        check(50 < self.percentile <= 100, self, "percentile", "it is above 50 and up to 100")
        check(self.terms in (1, 2), self, "terms", "a level is 1 power of two or a sum of 2")
        check(self.activations in (0, 8, 16), self, "activations", "it is 8 or 16 bits, or 0 for floats")
        check_word(self, "activation_range", (*ACTIVATION_RANGES, DYNAMIC))
        check_word(self, "products", PRODUCTS)
        fine = 50 < self.activation_percentile <= 100
        check(fine, self, "activation_percentile", "it is above 50 and up to 100")
        if self.activations:
            check_weights(self)
        if self.activations == 16 and self.activation_range == DYNAMIC:
            raise SettingError(
                "quantize: activations=16 with activation_range='dynamic', but ONNX finds ranges of 8-bit "
                "codes alone when a file runs. Give activations=8, or a range from calibration batches"
            )
        check_effect(self)
        check_way(self)
        if self.range == "fixed":
            self.ends()

    @property
    def levels(self) -> tuple[int, ...]:
        """The bits that a layer may have, ascending."""
        return tuple(sorted({int(word) for word in (self.allowed or str(self.bits)).split(",")}))

    def ends(self) -> tuple[float, float] | None:
        """(low, high) of a fixed range, else None. The range contains 0, so that 0 is decoded exactly."""
        if self.range != "fixed":
            return None
        high = math.nan if self.high is None else self.high
        low = -high if self.symmetric else math.nan if self.low is None else self.low
        if not -math.inf < low <= 0 <= high < math.inf or low == high:
            raise SettingError(
                f"quantize: range=fixed with low={self.low!r} and high={self.high!r}, but low <= 0 <= high "
                f"and not both 0; with symmetric=true give only high"
            )
        return low, high

    @property
    def needs(self) -> Needs:
        if self.rounding == "auto":
            return Needs.MODEL | Needs.TASK | Needs.SCORES | Needs.WHOLE
        if self.allowed is not None:
            scored = Needs.MODEL | Needs.TASK | Needs.SCORES if self.max_drop is not None else Needs.NOTHING
            return super().needs | Needs.WHOLE | scored
        if not self.activations and self.rounding == "nearest" and not self.awq:
            return super().needs
        moving = self.activation_range == DYNAMIC and self.rounding == "nearest"
        task = Needs.EXAMPLE if moving else Needs.TASK
        return super().needs | Needs.MODEL | task | Needs.WHOLE

    @property
    def plain_range(self) -> str:
        """How the ends of a grid are found without data."""
        if self.range in ("auto", "output"):
            return "minmax" if self.rounding == "nearest" else "mse"
        return self.range

    def run(self, view: View) -> Iterator[Group]:
        if self.rounding == "auto":
            yield from searched(self, view)
            return
        if self.activations:
            yield from integers(self, view)
            return
        if self.awq:
            chosen = {site.name for site in view.weights(self.where)}
            view = yield from activation_aware(view, chosen, lambda w: self.store(w, None, 0).decode())
        if self.rounding in BY_OUTPUTS:
            made = self.compensated(view, view.weights(self.where))
            new = [Edit(name, view.form(name), form, made.hows[name]) for name, form in made.forms.items()]
            done = [self.note(s.name, view.form(s), made.forms[s.name]) for s in view.weights(self.where)]
            yield Group("all", (*new, *done, *made.notes()))
            return
        if self.allowed is not None:
            yield from mixed(self, view)
            return
        if self.epochs == 0:
            for site in view.each(self.where):
                edit = self.edit(view, site)
                yield site_group(
                    site.name, edit, self.note(site.name, view.form(site), cast(Form, edit.after))
                )
            if (about := advice(self, view)) and "advice" not in view.done:
                yield Group("advice", about)
            return
        edits = {site.name: self.edit(view, site) for site in view.weights(self.where)}
        after, events = self.retrained(view, edits)
        notes = (self.note(name, view.forms[name], after[name]) for name in edits)
        yield Group("all", (*events, *notes))

    def compensated(
        self, view: View, sites: list[Site], edges: Mapping[str, Grid] | None = None
    ) -> Compensated:
        """The sites' weights rounded by the error of outputs, on this step's grids. `edges`: the grids that
        round activations."""
        found = "output" if self.range == "auto" else self.range
        grids = Grids(
            self.rounding, self.bits, self.per, self.group, self.symmetric, found, self.percentile,
            self.ends(), self.damp,
        )  # fmt: skip
        blocks = Blockwise(view, edges or {}) if self.rounding == "brecq" else None
        made = Compensated(view, self.edit, grids=grids, blocks=blocks)
        made.run(sites)
        for name, form in made.forms.items():
            self.refuse_empty(name, view.form(name), form)
        return made

    def refuse_empty(self, name: str, before: Form, after: Form) -> None:
        """RefusedError for a weight of which a fixed range leaves zeros only: its steps are too coarse."""
        if self.range == "fixed" and all_lost(before, after):
            raise RefusedError(
                f"quantize: {name} holds only numbers that are too small for range=fixed with "
                f"high={self.high}, and all would become 0. Give a range as large as the weights', or leave "
                f"it out: where='*,!{name}'"
            )

    def edit(self, view: View, site: Site) -> Edit:
        """The site's weights on this step's grid."""
        store = partial(self.store, groups=view.groups(site) if site.axis else 1)
        after, how = refine(view.form(site), store, site.axis)
        if self.scheme in HALVES:
            refuse_lost(site.name, view.form(site), after, self.scheme)
        self.refuse_empty(site.name, view.form(site), after)
        return Edit(site.name, view.form(site), after, how)

    def store(self, w: Tensor, keep: Tensor | None, axis: int, *, groups: int = 1) -> Form:
        """The weights on this step's grid. In a transposed convolution [I, O / groups, ...] an output channel
        is an index of axis 1 in a group of inputs, so a scale per channel is one for each such group."""
        rows = to_rows(w.float(), axis)
        within = None if keep is None else to_rows(keep, axis)
        shape = tuple(w.shape)
        per, size = self.per, self.group
        whole = rows.shape[1] % groups == 0  # not a factor of a product
        if per == "channel" and groups > 1 and whole and self.scheme in ("uniform", "log"):
            per, size = "group", rows.shape[1] // groups
        group = size if per == "group" else 0

        def leaf(codes: Tensor) -> Dense:
            return Dense(from_rows(codes, shape, axis).contiguous())

        if self.scheme == "uniform":
            codes, scale, zero = uniform_grid(
                rows, self.bits, per=per, group=size, symmetric=self.symmetric,
                range=self.plain_range, percentile=self.percentile, ends=self.ends(), keep=within,
            )  # fmt: skip
            return Affine(
                leaf(codes), Dense(scale), None if zero is None else Dense(zero), self.bits, group, axis
            )
        if self.scheme == "log":
            codes, scale = log_grid(
                rows, self.bits, terms=self.terms, per=per, group=size, range=self.plain_range,
                keep=within,
            )  # fmt: skip
            return LogGrid(leaf(codes), Dense(scale), self.bits, self.terms, group, axis)
        if self.scheme in HALVES:
            return Dense(w.to(HALVES[self.scheme]))
        if self.scheme == "binary":
            index, scale = binary(rows, self.per, keep=within)
            return Codebook(leaf(index), Dense(torch.tensor([-1.0, 1.0])), Dense(scale), axis)
        index, scale = ternary(rows, self.per, keep=within, rule=self.rule)
        return Codebook(leaf(index), Dense(torch.tensor([-1.0, 0.0, 1.0])), Dense(scale), axis)

    def note(self, site: str, before: Form, after: Form) -> Note:
        grid = f"{self.bits} bits" if self.scheme in ("uniform", "log") else self.scheme
        if self.scheme in HALVES and (gone := vanished(before, after)):
            grid += f", {counted(gone, 'number')} of {math.prod(before.shape):,} too small for it and now 0"
        return rounded_note(site, before, after, grid)


def refuse_lost(name: str, before: Form, after: Form, scheme: str) -> None:
    """RefusedError for a weight with numbers that 16-bit floats made infinite, or all of them 0."""
    if not all(part.isfinite().all() for part in after.slices()):
        text = f"holds numbers above {torch.finfo(HALVES[scheme]).max:,.7g}, which {scheme} does not have"
    elif all_lost(before, after):
        text = f"holds only numbers that are too small for {scheme}, and all would become 0"
    else:
        return
    way_out = "Give scheme=bfloat16, or leave" if scheme == "float16" else "Leave"
    raise RefusedError(f"quantize: {name} {text}. {way_out} it out: where='*,!{name}'")


def all_lost(before: Form, after: Form) -> bool:
    """Whether rounding made all numbers 0."""
    return any(part.any() for part in before.slices()) and not any(part.any() for part in after.slices())


def vanished(before: Form, after: Form) -> int:
    """How many numbers rounding made 0."""
    pairs = zip(before.slices(), after.slices(), strict=True)
    return sum(int(((old != 0) & (new == 0)).sum()) for old, new in pairs)
