"""Prune: set the least important weights to zero.

w[o, i] -> w[o, i] where |w| is among the largest, else 0       stored: a mask, and the weights kept
among     a tensor, a channel, a group (one threshold each); all layers together, by |w|, by LAMP score (Lee
          2021) or in units of each layer; or N of every M inputs
gradual   the share kept falls by the cubic rule while training, then the mask is fixed (Zhu, Gupta 2017)
rounds    prune, retrain, prune further; each round has the whole learning rate schedule (Renda 2020), and can
          begin again from the weights that this step was given (Frankle 2019)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.forms import At, Dense, Form, Masked, uncoded
from tersor.forms.form import from_rows, to_rows
from tersor.maths.scores import (
    cubic,
    global_keep,
    lamp_scores,
    magnitude_keep,
    n_m_along,
    n_m_keep,
    threshold_keep,
)
from tersor.model.sites import Site
from tersor.model.trainable_forms import TrainableForms
from tersor.model.trainable_parts import MaskedPart
from tersor.record.events import Edit, Group, Note, site_group
from tersor.setting_effects import LEFT_OUT, Above, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.refit_kept import RefitKept
from tersor.steps.retrain import Retrain

PER = ("tensor", "channel", "group", "global", "lamp", "spread")
TOGETHER = ("global", "lamp", "spread")  # one threshold for all sites
EVERY = 20  # training steps between two narrowings of a gradual mask


@dataclass(frozen=True, kw_only=True)
class Prune(Retrain):
    """Set the smallest weights to zero, at once or while training."""

    name: ClassVar[str] = "prune"
    only: ClassVar[Only] = {
        "keep": {"threshold": LEFT_OUT, "pattern": LEFT_OUT},
        "per": {"threshold": LEFT_OUT, "pattern": LEFT_OUT},
        "group": {"per": ("group",)},
        "threshold": {"pattern": LEFT_OUT},
        "correct": {"epochs": (0,)},
        "ramp": {"epochs": Above(0), "threshold": LEFT_OUT, "pattern": LEFT_OUT},
        "rounds": {"epochs": Above(0)},
        "rewind": {"rounds": Above(1)},
    }
    keep: float = 0.5  # share of weights kept, 0 < keep <= 1
    # What shares a threshold: "tensor", "channel", "group"; or all layers together, by |w| ("global"), by |w|
    # over the layer's root mean square ("spread"), or by LAMP score ("lamp").
    per: str = "lamp"
    group: int = 64  # weights that share a threshold, if per is "group"
    threshold: float | None = None  # prune weights smaller than this, instead of keep and per
    # "2:4" keeps 2 of every 4 inputs (in a kernel, at each position), instead of keep and per.
    pattern: str | None = None
    # Refit what is kept to what the layers gave before, if the task has calibration batches: no labels.
    correct: bool = True
    ramp: float = 0.0  # share of the training over which the mask narrows; 0 prunes at once and then trains
    rounds: int = 1  # times to prune and retrain until keep is reached
    rewind: str = "none"  # each round begins from: "none" the last round's weights, "weights" the given ones

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.keep <= 1, self, "keep", "it is the share kept: 0 < keep <= 1")
        check_word(self, "per", PER)
        check(self.group >= 1, self, "group", "it is a number of weights: 1 or more")
        check(
            self.threshold is None or self.threshold >= 0, self, "threshold", "it is a magnitude: 0 or more"
        )
        check(0 <= self.ramp <= 1, self, "ramp", "it is a share of the training: 0 to 1")
        check(self.rounds >= 1, self, "rounds", "it is a count: 1 or more")
        check_word(self, "rewind", ("none", "weights"))
        if self.pattern is not None:
            self.n_m()
        check_effect(self)

    def n_m(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n <= m:
            raise SettingError(f"prune: pattern={self.pattern!r}, but it is N:M with 0 < N <= M, such as 2:4")
        return n, m

    @property
    def needs(self) -> Needs:
        together = self.per in TOGETHER and self.threshold is None and self.pattern is None
        return Needs.WHOLE if together and not self.epochs else super().needs

    def run(self, view: View) -> Iterator[Group]:
        if self.correct and not self.epochs and view.maybe_task is not None:
            yield self.corrected(view)
            return
        if self.needs is Needs.NOTHING:
            for site in view.each(self.where):
                form = view.form(site)
                after, how = self.wrapped(form, replace(site, groups=view.groups(site)))
                yield site_group(site.name, Edit(site.name, form, after, how), kept_note(site, after))
            return
        sites = [replace(site, groups=view.groups(site)) for site in view.weights(self.where)]
        forms = {site.name: mask_all(view.form(site)) for site in sites}
        if self.epochs == 0:
            narrow = self.narrowed(sites, forms, self.keep)
            for site in sites:
                form, after = view.form(site), narrow[site.name]
                how = "wrap" if holds(after, form) else "refine"
                yield site_group(site.name, Edit(site.name, form, after, how), kept_note(site, after))
            return
        state: dict[str, Form] = {**view.forms, **forms}
        for number in range(1, self.rounds + 1):
            first, last = (self.keep ** (n / self.rounds) for n in (number - 1, number))
            if self.ramp == 0:
                state |= self.narrowed(sites, state, last)
            if self.rewind == "weights" and number > 1:  # after pruning: trained weights decide what is kept
                state = {**view.forms, **{s.name: rewound(state[s.name], forms[s.name]) for s in sites}}
            moved, facts = view.train(
                self.plan(), forms=state, text=f"prune {number}/{self.rounds}",
                on_step=self.narrowing(sites, first, last) if self.ramp > 0 else None,
            )  # fmt: skip
            state |= moved
        changed = {name: form for name, form in state.items() if form.digest != view.forms[name].digest}
        notes = (kept_note(site, state[site.name]) for site in sites)
        trained = Note("", "trained", f"{self.rounds} x {self.epochs:g} epochs", facts)
        edits = (*view.edits(changed), *self.trained_with(view, changed))
        yield Group("all", (*edits, *notes, trained, *self.stayed(view)))

    def corrected(self, view: View) -> Group:
        """Masks, and kept weights that are refitted to them on the calibration batches, if there are any."""
        sites = [replace(site, groups=view.groups(site)) for site in view.weights(self.where)]
        masked = self.narrowed(sites, {site.name: mask_all(view.form(site)) for site in sites}, self.keep)

        def plain(view: View, site: Site) -> Edit:
            form, after = view.form(site), masked[site.name]
            return Edit(site.name, form, after, "wrap" if holds(after, form) else "refine")

        notes = [kept_note(site, masked[site.name]) for site in sites]
        if view.task.calibrate is None:
            text = "kept weights stay as they are: the task has no calibration batches to refit them on"
            edits = (plain(view, site) for site in sites)
            return Group("all", (*edits, *notes, Note("", "corrected", text, {"layers": 0})))
        refit = RefitKept(view, plain, masked=masked)
        refit.run(sites)
        edits = (Edit(name, view.form(name), form, refit.hows[name]) for name, form in refit.forms.items())
        return Group("all", (*edits, *notes, *refit.notes()))

    def wrapped(self, form: Form, site: Site) -> tuple[Form, str]:
        after = self.narrowed([site], {site.name: mask_all(form)}, self.keep)[site.name]
        return after, "wrap" if holds(after, form) else "refine"

    def narrowed(self, sites: list[Site], forms: Mapping[str, Form], share: float) -> dict[str, Form]:
        """The forms with every mask narrowed to `share` of its weights."""
        units = [(site, at) for site in sites for at in masks_of(forms[site.name], site.axis)]
        if self.pattern is not None:
            keeps = iter([self.patterned(site, at) for site, at in units])
        else:
            rows = self.choose([to_rows(at.node.decode().abs(), at.axis) for _, at in units], share)
            keeps = iter(
                [from_rows(keep, at.node.shape, at.axis) for keep, (_, at) in zip(rows, units, strict=True)]
            )

        def narrow(at: At) -> Form:
            return at.node.replace(**{at.node.mask: Dense(next(keeps) & mask_of(at.node).decode())})

        return {site.name: each_mask(forms[site.name], narrow, site.axis) for site in sites}

    def patterned(self, site: Site, at: At) -> Tensor:
        """N of every M inputs, bool of the mask's shape. If the inputs are unknown, N of every M in a row."""
        w, (n, m) = at.node.decode().abs(), self.n_m()
        whole = at.axis == site.axis and w.ndim == len(site.shape)  # not a factor of a product
        along = site.contracted if whole else 1 if w.ndim > 1 else None
        if along is None:
            return from_rows(n_m_keep(to_rows(w, at.axis), n, m), at.node.shape, at.axis)
        return n_m_along(w, n, m, along, site.groups if site.kind == "convtranspose" and whole else 1)

    def choose(self, rows: list[Tensor], share: float) -> list[Tensor]:
        """The weights to keep in each matrix of magnitudes, bool [O, I]."""
        if self.threshold is not None:
            return [threshold_keep(w, self.threshold) for w in rows]
        if self.per == "lamp":
            return global_keep([lamp_scores(w) for w in rows], share)
        if self.per == "spread":
            return global_keep([w / spread(w) for w in rows], share)
        if self.per == "global":
            return global_keep(rows, share)
        return [magnitude_keep(w, share, self.per, self.group) for w in rows]

    def narrowing(
        self, sites: list[Site], first: float, last: float
    ) -> Callable[[TrainableForms, int, int], None]:
        """The training hook that narrows masks by the cubic rule."""

        def on_step(tuned: TrainableForms, step: int, total: int) -> None:
            end = min(round(self.ramp * total), total - 1)  # the last step at the latest
            if step > end or (step % EVERY and step != end):
                return
            share = cubic(step, 0, end, first, last)
            modules = [module for site in sites for module in tuned.part_of(site.name).modules()]
            parts = [module for module in modules if isinstance(module, MaskedPart)]
            with torch.no_grad():
                rows = [to_rows(m.value().abs(), m.axis) for m in parts]
                for m, keep in zip(parts, self.choose(rows, share), strict=True):
                    m.keep &= from_rows(keep, tuple(m.keep.shape), m.axis)

        return on_step


def spread(w: Tensor) -> Tensor:
    """Root mean square of the nonzero weights: a layer's unit, independent of earlier pruning."""
    return w[w > 0].square().mean().sqrt() if (w > 0).any() else w.new_ones(())


def mask_all(form: Form) -> Form:
    """The form with a mask over each part that holds weights. Existing masks stay, and new ones hide nothing
    yet."""

    def change(at: At) -> Form | None:
        if at.body:
            return Masked(Dense(torch.ones(at.node.shape, dtype=torch.bool)), at.node)
        return at.node if at.node.mask or not at.weights else None

    return At(uncoded(form)).rebuilt(change)


def each_mask(form: Form, change: Callable[[At], Form], axis: int = 0) -> Form:
    """The form with each of its outermost masks changed."""
    return At(form, axis).rebuilt(lambda at: change(at) if at.node.mask else None)


def masks_of(form: Form, axis: int) -> list[At]:
    """The outermost masks of a form."""
    found: list[At] = []
    each_mask(form, lambda at: found.append(at) or at.node, axis)  # type: ignore[func-returns-value]
    return found


def mask_of(form: Form) -> Form:
    return form.children()[form.mask]


def rewound(form: Form, begin: Form) -> Form:
    """The masks of `form` over the bodies of `begin`."""
    old = dict(begin.walk())

    def change(at: At) -> Form:
        before = old[at.path]
        return before.replace(**{before.mask: mask_of(at.node)}) if before.mask else at.node

    return each_mask(form, change)


def holds(after: Form, before: Form) -> bool:
    return before.digest in {node.digest for path, node in after.walk() if path}


def kept_note(site: Site, form: Form) -> Note:
    kept = [mask_of(at.node).decode() for at in masks_of(form, site.axis)]
    count, total = sum(int(k.sum()) for k in kept), sum(k.numel() for k in kept)
    return Note(
        site.name, "done", f"kept {count} of {total} weights ({count / max(total, 1):.1%})", {"kept": count}
    )
