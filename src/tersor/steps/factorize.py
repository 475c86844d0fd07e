"""Factorize: store a weight as a product of thin factors, or make a layer of each factor.

factors   by SVD, Tucker-2, CP or spatial: factor_ranks.py. With calibration batches, SVD and Tucker have the
          least error on the layer's own inputs, E|(w - w') x|^2 (SVD-LLM 2024)
stored    fewer numbers; if a product does not have fewer, the layer is left alone, with a note
layers    each factor becomes a layer of its own: fewer operations too. Proved to compute what products do
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense, uncoded
from tersor.model.changes import Replace
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.factor_ranks import METHODS, factored, method_for, ranks_for, stored
from tersor.steps.retrain import Retrain
from tersor.steps.same_function import ROUNDING, difference, same_function
from tersor.steps.units import OUTSIDE


@dataclass(frozen=True, kw_only=True)
class Factorize(Retrain):
    """Store weights as low-rank products, or make smaller layers of them: SVD, Tucker, CP, spatial."""

    name: ClassVar[str] = "factorize"
    only: ClassVar[Only] = {"method": {"layers": (True,)}}
    keep: float | None = None  # share of the parameters kept; 0.5 if neither rank nor energy is given
    rank: int | None = None  # or the rank itself
    energy: float | None = None  # or the share of squared singular values kept
    multiple: int = 1  # ranks are a multiple of this, where there are as many: 8 or 16 suit kernels
    whiten: bool = True  # weigh errors by the layer's inputs, if the task has calibration batches
    layers: bool = False  # each factor becomes a layer: fewer operations, not only fewer numbers
    method: str = "svd"  # of kernels, with layers: "svd", "tucker", "cp" or "spatial"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [key for key in ("keep", "rank", "energy") if getattr(self, key) is not None]
        if len(given) > 1:
            raise SettingError(
                f"factorize: {' and '.join(given)} given, but only one of keep, rank, energy can set the rank"
            )
        check(
            self.keep is None or 0 < self.keep < 1,
            self,
            "keep",
            "it is the share of parameters kept: 0 < keep < 1",
        )
        check(self.rank is None or self.rank >= 1, self, "rank", "it is a count: 1 or more")
        check(self.energy is None or 0 < self.energy <= 1, self, "energy", "it is a share: 0 < energy <= 1")
        check(self.multiple >= 1, self, "multiple", "it is a rank: 1 or more")
        check_word(self, "method", METHODS)
        check_effect(self)

    @property
    def needs(self) -> Needs:
        return super().needs | (Needs.MODEL | Needs.TASK | Needs.WHOLE if self.layers else Needs.NOTHING)

    def run(self, view: View) -> Iterator[Group]:
        if self.layers:
            yield from self.as_layers(view)
            return
        if self.epochs == 0:
            for site in view.each(self.where):
                yield site_group(site.name, *events_of(self.product(view, site)))
            return
        made = [event for site in view.weights(self.where) for event in events_of(self.product(view, site))]
        _, events = self.retrained(view, {event.site: event for event in made if isinstance(event, Edit)})
        yield Group("all", (*events, *(event for event in made if isinstance(event, Note))))

    def product(self, view: View, site: Site) -> Split | Note:
        """One weight as a product, or a note with the reason for leaving it alone."""
        form = view.form(site)
        w = form.decode().float()
        if w.ndim < 2 or w.numel() == 0:
            return skipped(site, f"shape {list(w.shape)} cannot be factorized as a matrix")
        method = method_for(self.method, w, bool(site.axis))
        ranks = ranks_for(self, method, w)
        if (numbers := stored(method, w, ranks)) >= w.numel():
            what = f"ranks {ranks[0]} and {ranks[-1]} store" if len(ranks) > 1 else f"rank {ranks[0]} stores"
            return skipped(site, f"{what} {numbers} numbers, the weight {w.numel()}")
        made = factored(method, w, ranks, self.gram(view, site), bool(site.axis))
        how = "refine" if isinstance(uncoded(form), Dense) else "absorb"
        lost = int((w == 0).sum()) if any(node.mask for _, node in form.walk()) else 0
        text = made.text
        text += f"; {lost} zeros of its mask are lost, since a product keeps none" if lost else ""
        data = {"rank": ranks[0], "whitened": "whitened" in made.text} | ({"lost": lost} if lost else {})
        change = Replace(site.layer, made.stock, made.settings)
        return Split(Edit(site.name, form, made.form, how), Note(site.name, "done", text, data), change)

    def gram(self, view: View, site: Site) -> Tensor | None:
        if not self.whiten or view.maybe_task is None or view.maybe_task.calibrate is None:
            return None
        gram = view.gram(site)
        if gram is not None and not gram.isfinite().all():
            raise RefusedError(
                f"factorize: {site.name} reads NaN or infinity on the calibration batches, or numbers whose "
                f"squares are. Use whiten=false, or exclude the weight with where='!{site.name}'"
            )
        return gram

    # Each factor as a layer

    def as_layers(self, view: View) -> Iterator[Group]:
        """Products in place of the weights, then layers in place of the products; then they train."""
        _ = view.task  # whose batches prove it; refuses without one
        made = {
            site.name: self.product(view, site) if view.inside(site.name) else skipped(site, OUTSIDE)
            for site in view.weights(self.where) if site.is_weight
        }  # fmt: skip
        splits = {name: each for name, each in made.items() if isinstance(each, Split)}
        if why_not(view, splits.values()):
            for name, split in list(splits.items()):
                if why := why_not(view, [split]):
                    made[name] = skipped(view.sites[name], f"it stays one layer: {why}")
                    del splits[name]
        products = Group("products", tuple(event for each in made.values() for event in events_of(each)))
        yield products
        if not splits:
            return
        layers = Group("layers", tuple(split.change for split in splits.values()), "same")
        now, moved = yield from same_function(view.after(products), layers, "a layer for each factor")
        if now is None:
            why = view.refused.get(layers.key, f"outputs move by {moved:.1g} of the largest")
            raise RefusedError(f"factorize: {why}. Leave layers out with where='*,!NAME'")
        if self.epochs:
            forms, facts = now.train(self.plan(), text=self.name)
            trained = Note("", "trained", f"{self.epochs:g} epochs", facts)
            yield Group(
                "trained", (*now.edits(forms), *self.trained_with(now, forms), trained, *self.stayed(now))
            )


class Split(NamedTuple):
    """A weight as a product, and what its layer becomes if each factor is a layer."""

    edit: Edit
    note: Note
    change: Replace


def events_of(made: Split | Note) -> tuple[Edit | Note, ...]:
    return (made,) if isinstance(made, Note) else (made.edit, made.note)


def why_not(view: View, splits: Iterable[Split]) -> str:
    """Why the model would not compute the same with these layers split; "" if it does."""
    splits = list(splits)
    products = Group("products", tuple(split.edit for split in splits))
    layers = Group("layers", tuple(split.change for split in splits), "same")
    try:
        moved = difference(view.after(products), layers)
    except (RefusedError, SiteError) as error:
        return str(error)
    if math.isinf(moved):
        return "the model runs neither in float64 nor in float32 on the batches"
    return "" if moved <= ROUNDING else f"outputs move by {moved:.1g} of the largest"


def skipped(site: Site, why: str) -> Note:
    return Note(site.name, "skipped", why)
