"""Compensated: rounding=gptq, adaround and brecq of quantize. Each layer corrects what was rounded before it.

min E |q x' + b' - y|^2      x' what the layer reads in the model rounded so far, y what it computed before
refit      w' = w + (E y x'^T - w H) (H + pull)^-1, the floats that fit best; H = E x' x'^T
rounding   q on its grid, min (q - w') H (q - w')^T                          maths/compensation.py
           adaround: only the levels beside w'                               maths/adaptive_rounding.py
           brecq: then all layers of a block together                        blockwise.py
bias       b' = E y - q E x': the mean error of each output is 0 (bias correction, Nagel 2019). H is then the
           covariance, because a bias takes what errors have in common
Layers whose inputs cannot be observed are rounded to the nearest and named.
Cost: for each layer, or several that read the same, both models run over the calibration batches up to it,
then the sweeps of the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tersor.core.view import View
from tersor.encode import refine
from tersor.errors import few
from tersor.forms import Affine, Dense, Form, uncoded
from tersor.forms.form import from_rows, to_rows
from tersor.maths.adaptive_rounding import adapted
from tersor.maths.compensation import OnGrid, Rows, compensated, nearest
from tersor.model.frozen import frozen_in
from tersor.model.layer_moments import Moments, calls_of, layer_moments
from tersor.model.sites import Site
from tersor.model.stats import STOCK, has_gram
from tersor.record.events import Edit, Note
from tersor.steps.blockwise import Blockwise

PULL = 1e-2  # of the mean of the inputs' second moments: how strongly refitting prefers the old weights
# Of an input's own second moment, added to its variance. A variance below it is the rounding error of the
# difference that it is: inputs that are (nearly) the same in all samples. Without it, the error is fitted.
FLOOR = 1e-10
ENOUGH = 2  # samples for each input of a layer: with fewer, what is best for them need not be for others


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


@dataclass
class Compensated:
    """New forms of weights and biases, and what is to be said about them."""

    view: View
    grids: Grids
    plain: Callable[[View, Site], Edit]  # rounding to the nearest
    blocks: Blockwise | None = None  # with brecq
    forms: dict[str, Form] = field(default_factory=dict)
    hows: dict[str, str] = field(default_factory=dict)
    gains: dict[str, float] = field(
        default_factory=dict
    )  # error of outputs, over that of nearest, in decibels
    biases: dict[str, float] = field(default_factory=dict)  # corrected ones: the spread of the outputs
    kept: dict[str, int] = field(default_factory=dict)  # rows for which adaround is not better than nearest
    left: dict[str, str] = field(default_factory=dict)  # weights that are rounded to the nearest: why
    thin: dict[str, str] = field(default_factory=dict)  # weights whose inputs were seen too rarely: how often

    def run(self, sites: list[Site]) -> Compensated:
        """Round these weights: those without statistics, then the others in the order in which the model uses
        them."""
        before = self.view.plain()
        modules: dict[str, Any] = dict(before.named_modules())
        layers = {site.layer: site for site in sites if self.fits(site, modules.get(site.layer))}
        calls = calls_of(before, self.view.task, layers)
        reached = {path for together in calls for path in together}
        for path, site in layers.items():
            if path not in reached:
                self.left[site.name] = "no calibration batch reaches it"
        for site in sites:
            if site.name in self.left and not self.alone(site):
                self.nearest(site)
        after = self.view.plain(self.forms)
        modules, fixed = dict(after.named_modules()), frozen(after, self.view)
        if self.blocks is not None:
            self.blocks.begin(before, after, {path: s for path, s in layers.items() if path in reached})
        for number, together in enumerate(calls, 1):
            found = layer_moments(before, after, self.view.task, together)
            for path in together:
                site, module = layers[path], modules[path]
                if path not in found:
                    self.left[site.name] = "its output is not its weight times its input plus its bias"
                elif not found[path].finite:
                    self.left[site.name] = "its inputs or outputs are NaN or infinite"
                else:
                    self.layer(site, module, found[path], movable(self.view, module, path, fixed))
                    continue
                self.nearest(site)
                with torch.no_grad():
                    module.weight.copy_(self.forms[site.name].decode())
            if self.blocks is not None:
                self.blocks.reached(together, self.forms, self.biases, self.gains)
            self.view.observer.progress(number, len(calls), ", ".join(together))
        self.left = {name: why for name, why in self.left.items() if name not in self.gains}
        return self

    def nearest(self, site: Site) -> None:
        edit = self.plain(self.view, site)
        self.forms[site.name], self.hows[site.name] = cast(Form, edit.after), edit.how

    def fits(self, site: Site, module: Any) -> bool:
        """Whether the layer's inputs can be observed. If not, it is put into `left`."""
        names = {*self.view.state.aliases.values()}
        if not isinstance(module, STOCK) or site.name.rpartition(".")[2] != "weight":
            why = f"the inputs of {type(module).__name__} are not observed"
        elif site.name in names:
            why = "several layers share it"
        elif leaf_of(self.view.form(site), site) is None:
            why = "it is stored as a product or a sum"
        else:
            return True
        self.left[site.name] = why
        return False

    def layer(self, site: Site, module: Any, moments: Moments, bias: str) -> None:
        """Round one layer, and write it into the module. `bias`: the site of its bias, if that may change."""
        groups = getattr(module, "groups", 1)
        w = grouped(to_rows(module.weight.detach().cpu(), 0).double(), groups)
        xx, yx = moments.xx, moments.yx
        if moments.count < ENOUGH * w.shape[2]:
            self.thin[site.name] = f"{moments.count} for {w.shape[2]} inputs"
        mean_x, mean_y, h, c = xx[:, -1, :-1], yx[:, :, -1], xx[:, :-1, :-1], yx[:, :, :-1]
        floor = torch.zeros_like(h)
        if bias:
            floor = FLOOR * h.diagonal(dim1=1, dim2=2).diag_embed()
            h, c = h - mean_x[:, :, None] * mean_x[:, None], c - mean_y[:, :, None] * mean_x[:, None]
        elif module.bias is not None:
            c = c - grouped(module.bias.detach().cpu().double()[:, None], groups) * mean_x[:, None]
        self.rounded(site, refit(w, h, c, floor), h + floor)
        with torch.no_grad():
            module.weight.copy_(self.forms[site.name].decode())
        if bias:
            q = grouped(to_rows(module.weight.detach().cpu(), 0).double(), groups)
            value = (mean_y - (q @ mean_x[..., None])[..., 0]).flatten()
            module.bias.data.copy_(value)
            self.forms[bias] = Dense(module.bias.detach().cpu().clone())
            self.hows[bias] = "refine"
            spread = ((q @ h) * q).sum(-1).mean().clamp_min(0).sqrt()
            self.biases[bias] = float(spread)

    def alone(self, site: Site) -> bool:
        """Round a linear layer of the user's own class by itself, if its inputs are known."""
        linear = site.kind == "linear" and site.name not in {*self.view.state.aliases.values()}
        if not linear or not has_gram(site) or leaf_of(self.view.form(site), site) is None:
            return False
        gram = self.view.gram(site)
        if gram is None or not gram.isfinite().all():
            return False
        w = to_rows(self.view.form(site).decode(), site.axis)
        if gram.shape[0] != w.shape[1]:
            return False
        self.rounded(site, w[None].double(), gram[None].double())
        return True

    def rounded(self, site: Site, w: Tensor, h: Tensor) -> None:
        """Round w [G, O, I] of one site, given the second moments h [G, I, I] of its inputs."""
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


def frozen(model: nn.Module, view: View) -> tuple[str, ...]:
    """The frozen tensors. If all are, as in a model loaded for inference, that says nothing about any."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return ()
    return frozen_in(model, view.sites).tensors


def movable(view: View, module: Any, path: str, fixed: tuple[str, ...]) -> str:
    """The site of a layer's bias, "" if it has none of its own that may change: frozen, shared, stored in
    another form."""
    name = f"{path}.bias".lstrip(".")
    if module.bias is None or name not in view.sites or name in fixed:
        return ""
    plain = isinstance(uncoded(view.form(name)), Dense)
    return name if plain and name not in view.state.aliases.values() else ""


def refit(w: Tensor, h: Tensor, c: Tensor, floor: Tensor) -> Tensor:
    """The weights [G, O, I] that fit what the layer computed before best; `c` [G, O, I] are E y x'^T, `floor`
    [G, I, I] more of the pull."""
    pull = PULL * h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)[:, None, None] + 1e-30
    pull = pull * torch.eye(h.shape[1], dtype=h.dtype) + floor
    new = w + torch.linalg.solve(h + pull, (c - w @ h).mT).mT
    return new if bool(new.isfinite().all()) else w


def grouped(rows: Tensor, groups: int) -> Tensor:
    """[O, ...] -> [G, O / G, ...]"""
    return rows.unflatten(0, (groups, -1))


def leaf_of(form: Form, site: Site) -> Tensor | None:
    """The weights in a form, if one leaf of the weight's own shape holds them all."""
    leaves: list[Tensor] = []

    def collect(w: Tensor, keep: Tensor | None, axis: int) -> Form:
        leaves.append(w)
        return Dense(w)

    refine(form, collect, site.axis)
    return leaves[0] if len(leaves) == 1 and leaves[0].shape == form.shape else None


def as_form(made: OnGrid, shape: tuple[int, ...], axis: int) -> Affine:
    codes = made.codes.flatten(0, 1).to(torch.int8 if made.bits <= 8 else torch.int16)
    scale = made.scale.reshape(-1, made.scale.shape[-1])
    kind = torch.int16 if made.bits <= 8 else torch.int32
    shift = None if made.zero is None else Dense(made.zero.reshape(scale.shape).to(kind))
    group = made.group if made.per == "group" else 0
    leaf = Dense(from_rows(codes, shape, axis).contiguous())
    return Affine(leaf, Dense(scale.contiguous()), shift, made.bits, group, axis)
