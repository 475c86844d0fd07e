"""Layerwise: new weights layer by layer, each for what the layer reads in the model changed so far.

min E |w' x' + b' - y|^2      x' what the layer reads in the changed model, y what it computed before
best       w + (E y x'^T - w H) (H + pull)^-1, the floats that fit best; H = E x' x'^T. A step makes of them
           what it stores: rounded (compensated.py), with some zeros (kept_weights.py)
bias       b' = E y - w' E x': the mean error of each output is 0 (bias correction, Nagel 2019). H is then the
           covariance, because a bias takes what errors have in common
Layers whose inputs cannot be observed are changed as they are, and named.
Cost: for each layer, or several that read the same, both models run over the calibration batches up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.core.view import View
from tersor.encode import refine
from tersor.forms import Dense, Form, uncoded
from tersor.forms.form import to_rows
from tersor.model.frozen import frozen_in
from tersor.model.layer_moments import Moments, calls_of, layer_moments
from tersor.model.sites import Site
from tersor.model.stats import STOCK, has_gram
from tersor.record.events import Edit

PULL = 1e-2  # of the mean of the inputs' second moments: how strongly refitting prefers the old weights
# Of an input's own second moment, added to its variance. A variance below it is the rounding error of the
# difference that it is: inputs that are (nearly) the same in all samples. Without it, the error is fitted.
FLOOR = 1e-10
SAME = 1e-6  # of the outputs' spread: a bias that would change by less stays
ENOUGH = 2  # samples for each input of a layer: with fewer, what is best for them need not be for others


@dataclass
class Layerwise:
    """New forms of weights and biases, and what is to be said about them."""

    view: View
    plain: Callable[[View, Site], Edit]  # the change of a weight by itself
    forms: dict[str, Form] = field(default_factory=dict)
    hows: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # weights that were fitted
    biases: dict[str, float] = field(default_factory=dict)  # corrected ones: the spread of the outputs
    left: dict[str, str] = field(default_factory=dict)  # weights that are changed by themselves: why
    thin: dict[str, str] = field(default_factory=dict)  # weights whose inputs were seen too rarely: how often

    # What a step defines

    def fitted(self, site: Site, w: Tensor, h: Tensor, pull: Tensor) -> None:
        """Store the form of one weight, which should be near w [G, O, I] by the second moments h [G, I, I] of
        its inputs, in `forms` and `hows`. `pull` [G]: how strongly w itself is preferred."""
        raise NotImplementedError

    def pull(self, h: Tensor, count: int) -> Tensor:
        """How strongly refitting prefers the old weights [G]. `count`: samples that h [G, I, I] is of."""
        return PULL * h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)

    def why_not(self, site: Site) -> str:
        """Why a form does not suit; "" if it does."""
        return "" if leaf_of(self.view.form(site), site) is not None else "it is stored as a product or a sum"

    def begin(self, before: nn.Module, after: nn.Module, layers: Mapping[str, Site]) -> None:
        """Before the first layer. `before`, `after`: the models that run, private copies."""

    def reached(self, paths: Iterable[str]) -> None:
        """After these layers."""

    # The walk

    def run(self, sites: list[Site]) -> None:
        """Change these weights: those without statistics, then the others in the order in which the model
        uses them."""
        before = self.view.plain()
        modules: dict[str, Any] = dict(before.named_modules())
        layers = {site.layer: site for site in sites if self.fits(site, modules.get(site.layer))}
        calls = calls_of(before, self.view.task, layers) if layers else []
        reached = {path for together in calls for path in together}
        for path, site in layers.items():
            if path not in reached:
                self.left[site.name] = "no calibration batch reaches it"
        for site in sites:
            if site.name in self.left and not self.alone(site):
                self.by_itself(site)
        after = self.view.plain(self.forms)
        modules, fixed = dict(after.named_modules()), frozen(after, self.view)
        self.begin(before, after, {path: s for path, s in layers.items() if path in reached})
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
                self.by_itself(site)
                with torch.no_grad():
                    module.weight.copy_(self.forms[site.name].decode())
            self.reached(together)
            self.view.observer.progress(number, len(calls), ", ".join(together))
        self.left = {name: why for name, why in self.left.items() if name not in self.done}

    def by_itself(self, site: Site) -> None:
        edit = self.plain(self.view, site)
        self.forms[site.name], self.hows[site.name] = cast(Form, edit.after), edit.how

    def fits(self, site: Site, module: Any) -> bool:
        """Whether the layer's inputs can be observed. If not, it is put into `left`."""
        names = {*self.view.state.aliases.values()}
        if not isinstance(module, STOCK) or site.name.rpartition(".")[2] != "weight":
            why = f"the inputs of {type(module).__name__} are not observed"
        elif site.name in names:
            why = "several layers share it"
        else:
            why = self.why_not(site)
        if why:
            self.left[site.name] = why
        return not why

    def layer(self, site: Site, module: Any, moments: Moments, bias: str) -> None:
        """Change one layer, and write it into the module. `bias`: the site of its bias, if that may
        change."""
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
        pull = self.pull(h, moments.count)
        self.fitted(site, best(w, h, c, floor, pull), h + floor, pull)
        self.done.add(site.name)
        with torch.no_grad():
            module.weight.copy_(self.forms[site.name].decode())
        if bias:
            q = grouped(to_rows(module.weight.detach().cpu(), 0).double(), groups)
            value = (mean_y - (q @ mean_x[..., None])[..., 0]).flatten()
            spread = float(((q @ h) * q).sum(-1).mean().clamp_min(0).sqrt())
            if bool(((value - module.bias.detach().cpu()).abs() <= SAME * spread).all()):
                return  # all that differs is rounding
            module.bias.data.copy_(value)
            self.forms[bias] = Dense(module.bias.detach().cpu().clone())
            self.hows[bias], self.biases[bias] = "refine", spread

    def alone(self, site: Site) -> bool:
        """Change a linear layer of the user's own class by itself, if its inputs are known."""
        linear = site.kind == "linear" and site.name not in {*self.view.state.aliases.values()}
        if not linear or not has_gram(site) or self.why_not(site):
            return False
        gram = self.view.gram(site)
        if gram is None or not gram.isfinite().all():
            return False
        w = to_rows(self.view.form(site).decode(), site.axis)
        if gram.shape[0] != w.shape[1]:
            return False
        h = gram[None].double()
        self.fitted(site, w[None].double(), h, self.pull(h, self.view.samples(site)))
        self.done.add(site.name)
        return True


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


def best(w: Tensor, h: Tensor, c: Tensor, floor: Tensor, pull: Tensor) -> Tensor:
    """The weights [G, O, I] that fit what the layer computed before best; `c` [G, O, I] are E y x'^T, `floor`
    [G, I, I] more of the pull [G]."""
    ridge = (pull[:, None, None] + 1e-30) * torch.eye(h.shape[1], dtype=h.dtype) + floor
    new = w + torch.linalg.solve(h + ridge, (c - w @ h).mT).mT
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
