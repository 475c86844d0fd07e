"""Factorize: store a weight as a product of thin factors, or make a layer of each factor.

factors   by SVD, Tucker-2, CP, spatial or a tensor train: factor_ranks.py. With calibration batches, SVD and
          Tucker have the least error on the layer's own inputs, E|(w - w') x|^2 (SVD-LLM 2024)
stored    fewer numbers; if a product does not have fewer, the layer is left alone, with a note
ranks     those of all layers together, by the errors of their outputs: shared_ranks.py; or each layer's alone
layers    each factor becomes a layer of its own: fewer operations too. Proved to compute what products do
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense, uncoded
from tersor.forms.form import to_rows
from tersor.model.changes import Replace
from tersor.model.layer_macs import layer_macs
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import LEFT_OUT, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.factor_ranks import METHODS, factored, method_for, ranks_for, stored
from tersor.steps.retrain import Retrain
from tersor.steps.same_function import ROUNDING, difference, same_function
from tersor.steps.shared_ranks import (
    SHARES,
    Ranks,
    Seen,
    Shared,
    Use,
    Ways,
    seen,
    sensitivities,
    shared,
    ways_of,
)
from tersor.steps.units import OUTSIDE

UNITS = {"parameters": "numbers", "macs": "multiply-accumulates of a batch"}  # of a budget
PER = ("global", "tensor")
WHOLE = "it stays whole: as a product it would lose more for each number saved than other weights"


@dataclass(frozen=True, kw_only=True)
class Factorize(Retrain):
    """Store weights as low-rank products, or make smaller layers of them: SVD, Tucker, CP, spatial, TT."""

    name: ClassVar[str] = "factorize"
    only: ClassVar[Only] = {
        "method": {"layers": (True,)},
        "per": {"rank": LEFT_OUT, "energy": LEFT_OUT},
        "of": {"layers": (True,), "per": ("global",), "rank": LEFT_OUT, "energy": LEFT_OUT},
    }
    keep: float | None = None  # share kept; 0.5 if neither rank nor energy is given
    of: str = "parameters"  # what it is a share of: "parameters"; "macs": multiply-accumulates, with layers
    # What keep is a share of: "global", all layers together, where each gets what its errors need; "tensor",
    # each layer.
    per: str = "global"
    rank: int | None = None  # or the rank itself
    energy: float | None = None  # or the share of squared singular values kept
    multiple: int = 1  # ranks are a multiple of this, where there are as many: 8 or 16 suit kernels
    whiten: bool = True  # weigh errors by the layer's inputs, if the task has calibration batches
    layers: bool = False  # each factor becomes a layer: fewer operations, not only fewer numbers
    method: str = "svd"  # of kernels, with layers: "svd", "tucker", "cp", "spatial" or "tt"

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
            "it is the share kept: 0 < keep < 1",
        )
        check(self.rank is None or self.rank >= 1, self, "rank", "it is a count: 1 or more")
        check(self.energy is None or 0 < self.energy <= 1, self, "energy", "it is a share: 0 < energy <= 1")
        check(self.multiple >= 1, self, "multiple", "it is a rank: 1 or more")
        check_word(self, "of", tuple(UNITS))
        check_word(self, "per", PER)
        check_word(self, "method", METHODS)
        check_effect(self)

    @property
    def together(self) -> bool:
        """Whether the layers share one budget."""
        return self.per == "global" and self.rank is None and self.energy is None

    @property
    def needs(self) -> Needs:
        whole = Needs.WHOLE if self.together else Needs.NOTHING
        return super().needs | (Needs.MODEL | Needs.TASK | Needs.WHOLE if self.layers else whole)

    def run(self, view: View) -> Iterator[Group]:
        if self.layers:
            yield from self.as_layers(view)
            return
        if self.epochs == 0 and not self.together:
            for site in view.each(self.where):
                ranks = self.ranks(view, [site], {}).ranks
                yield site_group(site.name, *events_of(self.product(view, site, ranks)))
            return
        sites = view.weights(self.where)
        found = self.ranks(view, sites, {})
        made = [event for site in sites for event in events_of(self.product(view, site, found.ranks))]
        edits = {event.site: event for event in made if isinstance(event, Edit)}
        events = self.retrained(view, edits)[1] if self.epochs else tuple(edits.values())
        yield Group("all", (*events, *(event for event in made if isinstance(event, Note)), *found.notes))

    def ranks(self, view: View, sites: Sequence[Site], known: dict[str, Ways]) -> Shared:
        """The ranks of the weights that have two axes. `known`: the ways to store a weight, where they are
        known; those of other weights are added."""
        if not self.together:
            return Shared({site.name: self.own_ranks(view, site) for site in sites}, ())
        new = [site for site in sites if site.name not in known]
        uses, saw = self.uses(view) if self.of == "macs" and new else None, dict[str, Seen | None]()
        for number, site in enumerate(new, 1):
            w = view.form(site).decode().float()
            use = Use() if uses is None else uses.get(site.layer)
            if w.ndim < 2 or w.numel() == 0 or use is None:
                continue
            method, gram = method_for(self.method, w, bool(site.axis)), self.gram(view, site)
            known[site.name] = ways_of(self, method, w, gram, bool(site.axis), use=use)
            saw[site.name] = seen(to_rows(w, site.axis), gram)
            view.observer.progress(number, len(new), f"ranks of {site.name}")
        for name, size in (sensitivities(view, saw) if len(known) > 1 else {}).items():
            known[name] = known[name].times(*size)
        ways = {site.name: known[site.name] for site in sites if site.name in known}
        return shared(ways, 0.5 if self.keep is None else self.keep, UNITS[self.of])

    def own_ranks(self, view: View, site: Site) -> Ranks:
        """The ranks of one weight by itself; None if it has no two axes."""
        w = view.form(site).decode().float()
        if w.ndim < 2 or w.numel() == 0:
            return None
        return ranks_for(self, method_for(self.method, w, bool(site.axis)), w)

    def uses(self, view: View) -> dict[str, Use]:
        """How each layer uses its numbers: the positions of a batch, what it reads."""
        part = view.part
        model = part.plain()
        modules, found = dict(model.named_modules()), dict[str, Use]()
        for path, (macs, reads) in layer_macs(model, part.task).items():
            weight = getattr(modules.get(path), "weight", None)
            if isinstance(weight, Tensor) and weight.numel():
                found[path] = Use(max(1, macs // weight.numel()), reads)
        return found

    def product(self, view: View, site: Site, ranks: Mapping[str, Ranks]) -> Split | Note:
        """One weight as a product, or a note with the reason for leaving it alone."""
        form = view.form(site)
        w = form.decode().float()
        if w.ndim < 2 or w.numel() == 0:
            return skipped(site, f"shape {list(w.shape)} cannot be factorized as a matrix")
        if site.name not in ranks:
            return skipped(site, "its layer does no multiply-accumulates, or its code does not call it")
        method = method_for(self.method, w, bool(site.axis))
        its = ranks[site.name] or ranks_for(replace(self, keep=SHARES[0]), method, w)
        if (numbers := stored(method, w, its)) >= w.numel():
            what = f"ranks {its[0]} and {its[-1]} store" if len(its) > 1 else f"rank {its[0]} stores"
            return skipped(site, f"{what} {numbers} numbers, the weight {w.numel()}")
        if ranks[site.name] is None:
            return skipped(site, WHOLE)
        made = factored(method, w, its, self.gram(view, site), site)
        how = "refine" if isinstance(uncoded(form), Dense) else "absorb"
        lost = int((w == 0).sum()) if any(node.mask for _, node in form.walk()) else 0
        text = made.text
        text += f"; {lost} zeros of its mask are lost, since a product keeps none" if lost else ""
        data = {"rank": its[0], "whitened": "whitened" in made.text} | ({"lost": lost} if lost else {})
        return Split(Edit(site.name, form, made.form, how), Note(site.name, "done", text, data), made.changes)

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
        sites = [site for site in view.weights(self.where) if site.is_weight]
        left = {site.name: OUTSIDE for site in sites if not view.inside(site.name)}
        known, before = dict[str, Ways](), dict[str, tuple[Ranks, Split | Note]]()
        while True:  # what turns out to stay one layer leaves its budget to the others
            asked = [site for site in sites if site.name not in left]
            found = self.ranks(view, asked, known)
            for site in asked:
                its = found.ranks.get(site.name)
                if site.name not in before or before[site.name][0] != its:
                    before[site.name] = its, self.product(view, site, found.ranks)
            made = {site.name: before[site.name][1] for site in asked}
            splits = {name: each for name, each in made.items() if isinstance(each, Split)}
            bad = unfit(view, splits)
            if not bad:
                break
            left |= bad
        made |= {name: skipped(view.sites[name], why) for name, why in left.items()}
        notes = tuple(event for each in made.values() for event in events_of(each))
        products = Group("products", (*notes, *found.notes))
        yield products
        if not splits:
            return
        layers = Group(
            "layers", tuple(change for split in splits.values() for change in split.changes), "same"
        )
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
    changes: tuple[Replace, ...]


def events_of(made: Split | Note) -> tuple[Edit | Note, ...]:
    return (made,) if isinstance(made, Note) else (made.edit, made.note)


class Moved(NamedTuple):
    """By how much of the largest output the outputs move, and why that is too much; "" if it is not."""

    by: float
    why: str


def try_split(view: View, splits: Iterable[Split]) -> Moved:
    """What happens to the outputs if these layers are split."""
    splits = list(splits)
    products = Group("products", tuple(split.edit for split in splits))
    layers = Group("layers", tuple(change for split in splits for change in split.changes), "same")
    try:
        by = difference(view.after(products), layers)
    except (RefusedError, SiteError) as error:
        return Moved(math.inf, str(error))
    if math.isinf(by):
        return Moved(by, "split, the model runs in no precision on the batches, or gives only 0")
    if by <= ROUNDING:
        return Moved(by, "")
    short = any(view.sites[split.edit.site].torch_dtype.itemsize < 4 for split in splits)
    hint = ": 16 bits round factors and products apart; give the model in float32" if short else ""
    return Moved(by, f"outputs move by {by:.1g} of the largest{hint}")


def unfit(view: View, splits: Mapping[str, Split]) -> dict[str, str]:
    """The weights whose layers cannot be split, and why."""
    together = try_split(view, splits.values())
    if not together.why:
        return {}
    found = {name: try_split(view, [split]) for name, split in splits.items()}
    bad = {name: f"it stays one layer: {each.why}" for name, each in found.items() if each.why}
    if bad:
        return bad
    # Each alone is within rounding, all are not: those that move the least are split.
    order = sorted(found, key=lambda name: found[name].by)
    within = itertools.accumulate(found[name].by for name in order)
    few = min(sum(total <= ROUNDING for total in within), len(order) - 1)
    return dict.fromkeys(order[few:], f"it stays one layer: with all split, {together.why}")


def skipped(site: Site, why: str) -> Note:
    return Note(site.name, "skipped", why)
