"""Penalize: train with a price on every bit, to reach a target size.

loss + price * bits(codes)    w = scale * codes, rounded straight through; bits under a learned density with a
                              factor for each row and column: model/rate_penalized.py
price    controlled to reach `nbytes`: the target size falls geometrically over the first `warm` of the
         training and is constant afterwards; the price rises if the size is above it, and falls if it is
         below
after    dead units: constant ones are folded into a bias, unread ones are cleared: model/dead_units.py
order    hidden units are put in the order that codes best, in measurements too: model/channel_order.py
cost     `epochs` passes; 12 runs of an entropy coder to measure the size           Oktay 2019, LilNetX 2023
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor.core.view import View
from tersor.encode import refine
from tersor.errors import RefusedError, SettingError
from tersor.forms import Affine, Dense, Form, uncoded
from tersor.forms.form import from_rows, to_rows
from tersor.maths.uniform_grid import limits, requantize
from tersor.maths.units import TINY
from tersor.model.batches import move
from tersor.model.channel_order import Link, arranged, links
from tersor.model.dead_units import clear
from tersor.model.example import example_inputs
from tersor.model.rate_penalized import RatePenalizedPart
from tersor.model.sites import Site
from tersor.model.trainable_forms import TrainableForms
from tersor.record.events import Edit, Group, Note
from tersor.setting_effects import GIVEN, LEFT_OUT, Above, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.entropy import Entropy
from tersor.steps.retrain import Retrain, check_teacher, teacher_of

BITS = 8  # of a code, before it is coded
TOP = limits(BITS, True)[1]
EVERY = 10  # training steps between two measurements of the size
ASKED = 12  # runs of the coder in a training
FIRST = 0.1  # the first price of a bit, over the number of weights: too low to have an effect
PACE = 60.0  # largest change of the price's natural logarithm in a training
FASTEST = 0.1  # and in one step of a short training
AHEAD = 0.1  # of a training: how far ahead the size is predicted; without it the price would overshoot
FINER = 8  # the steps of biases are finer: a bias changes every output of its unit
EMPTY = 0.01  # assumed root mean square of weights that are all 0
FAR = 0.3  # log of size over target at which the price changes fastest


@dataclass(frozen=True, kw_only=True)
class Penalize(Retrain):
    """Train with a price on every bit, to reach a size: few, small and clustered codes."""

    name: ClassVar[str] = "penalize"
    only: ClassVar[Only] = {
        "bits": {"nbytes": LEFT_OUT, "price": LEFT_OUT},
        "teacher": {"teacher_weight": Above(0)},
        "teacher_file": {"teacher": GIVEN},
    }
    nbytes: int | None = None  # of all stored arrays after entropy coding: the file without its header
    bits: float = 1.0  # or the bits for each priced weight, if nbytes is not given
    price: float | None = None  # or a fixed price of a bit in the loss, instead of a size
    warm: float = 0.3  # share of the training over which size or price reach their target
    per: str = "tensor"  # what shares a learned step: "tensor" or "channel"
    step: float = 0.5  # the first step of weights, in their standard deviations; biases have an 8th of it
    vectors: bool = True  # biases and norms of the layers too
    arrange: bool = True  # reorder hidden units so that similar ones are neighbors: the same function
    teacher: Any = ""  # "": the model as it was given; "file.py:factory", "zoo:NAME"; in Python a module
    teacher_file: str = ""  # the teacher's weights, a .safetensors file
    epochs: float = 10.0
    lr: float = 2e-3
    teacher_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.epochs > 0, self, "epochs", "it is a number of passes: above 0")
        check(self.nbytes is None or self.nbytes > 0, self, "nbytes", "it is a number of bytes: above 0")
        check(0 < self.bits <= BITS, self, "bits", f"it is bits for each weight: above 0, up to {BITS}")
        fine = self.price is None or 0 <= self.price < math.inf
        check(fine, self, "price", "it is in units of the loss: 0 or more")
        check(0 <= self.warm <= 1, self, "warm", "it is a share of the training: 0 to 1")
        check(0 < self.step < math.inf, self, "step", "it is in standard deviations: above 0")
        check_word(self, "per", ("tensor", "channel"))
        check_teacher(self)
        if self.nbytes is not None and self.price is not None:
            raise SettingError("penalize: nbytes and price are both given: a size or a price, not both")
        check_effect(self)

    def run(self, view: View) -> Iterator[Group]:
        priced = self.priced(view)
        edits = {}
        for site in priced:
            form, how = refine(view.form(site), self.grid, site.axis)
            edits[site.name] = (form, how)
        count = sum(math.prod(view.shape(site)) for site in priced)
        layers = {site.layer for site in priced}
        found, alone = self.links(view, layers)
        prices = Prices(self, view, self.nbytes or self.bits * count / 8, count, found)
        teacher = teacher_of(self, view) if self.teacher_weight > 0 else None
        moved, facts = view.train(
            self.plan(), forms={n: form for n, (form, _) in edits.items()}, teacher=teacher, on_step=prices,
            begin={n: view.forms[n] for n in edits}, makers=dict.fromkeys(edits, RatePenalizedPart),
            text=self.name,
        )  # fmt: skip
        after = {name: form for name, (form, _) in edits.items()} | moved
        after, note = cleared(view, after, layers)
        after |= arranged({**view.forms, **after}, found)
        hows = {name: how for name, (_, how) in edits.items()}
        events = [Edit(n, view.forms[n], after[n], hows.get(n, "refine")) for n in view.sites if n in after]
        events += self.trained_with(view, after)
        notes = [zeros(site, after[site.name]) for site in priced]
        now = nbytes_of({**view.forms, **after})
        text = f"{self.epochs:g} epochs, about {now} bytes once entropy-coded"
        if self.price is None:
            text += f"; target {round(prices.target)}"
        order = [order_of(found, alone)] if self.arrange else []
        trained = Note("", "trained", text, facts | {"nbytes": now})
        yield Group("all", (*events, *notes, note, *order, trained, *self.stayed(view)))

    def priced(self, view: View) -> list[Site]:
        """The weights that `where` picks and, with `vectors`, the biases and norms of their layers."""
        chosen = view.weights(self.where)
        names = {site.name for site in chosen}
        layers = {site.layer for site in chosen}
        every = self.where in ("*", ("*",))  # norms are layers of their own
        vectors = [
            site for site in view.sites.values()
            if self.vectors and site.is_parameter and len(site.shape) == 1 and 0 not in site.shape
            and site.name not in names and (every or site.layer in layers)
        ]  # fmt: skip
        return [*chosen, *vectors]

    def links(self, view: View, layers: set[str]) -> tuple[list[Link], str]:
        """Pairs of these layers whose hidden units may be reordered, and the reason if there are none."""
        if not self.arrange:
            return [], ""
        part = view.part
        model = part.plain().eval().cpu()  # the forms are on the CPU too
        try:
            every = links(model, move(example_inputs(part.task, model), torch.device("cpu")))
        except RefusedError as error:
            return [], str(error)
        free = {site.name for site in view.sites.values() if site.layer in layers}
        found = [link for link in every if free >= {*link.rows, link.columns}]
        return found, "no layer's units are read by exactly one other layer"

    def grid(self, w: Tensor, keep: Tensor | None, axis: int) -> Form:
        """Codes on the first grid, coarse for weights and fine for biases and norms."""
        rows = to_rows(w.detach().float(), axis)
        rows = rows if keep is None else rows * to_rows(keep, axis)
        spread = rows if self.per == "tensor" or w.ndim < 2 else rows.unsqueeze(1)
        whole = float(rows.square().mean().sqrt()) or EMPTY  # an empty row must be able to learn again
        size = spread.square().mean((-2, -1)).sqrt().reshape(-1, 1).clamp_min(whole / 16)
        farthest = spread.abs().amax((-2, -1)).reshape(-1, 1)  # the largest weight must have a code too
        scale = torch.maximum(size * self.step / (1 if w.ndim > 1 else FINER), farthest / TOP).clamp_min(TINY)
        codes = requantize(rows, scale, None, BITS, 0, True)
        codes = from_rows(codes, tuple(w.shape), axis).contiguous()
        return Affine(Dense(codes), Dense(scale), None, BITS, 0, axis)


class Prices:
    """The training hook that sets the price of a bit. Its state is stored in the parts, for resumed runs."""

    def __init__(self, step: Penalize, view: View, target: float, count: int, found: list[Link]):
        self.step, self.view, self.target, self.count, self.links = step, view, target, count, found

    def __call__(self, tuned: TrainableForms, at: int, total: int) -> None:
        if at % EVERY and at != total - 1:
            return
        parts = [module for module in tuned.modules() if isinstance(module, RatePenalizedPart)]
        for part in parts:
            part.learn()
        if self.step.price is not None:
            reached = min(1.0, (at + 1) / (self.step.warm * total)) if self.step.warm else 1.0
            price = self.step.price * reached
        else:
            price = self.towards(tuned, parts, at, total)
        for part in parts:
            part.price.fill_(price)

    def towards(self, tuned: TrainableForms, parts: list[RatePenalizedPart], at: int, total: int) -> float:
        """The price that leads to the current target size."""
        predicted = sum(part.nbytes for part in parts)
        first = parts[0]
        if at // EVERY % max(1, total // EVERY // ASKED) == 0:
            forms = {**self.view.forms, **tuned.fold()}
            first.over.fill_(nbytes_of({**forms, **arranged(forms, self.links)}) - predicted)
        size = max(predicted + float(first.over), 1.0)
        now, ahead = math.log(size), AHEAD * total
        if at == 0:
            first.began.fill_(max(size, self.target))
            first.was.fill_(now)
            return FIRST / self.count
        first.was += (now - first.was) * min(1.0, EVERY / ahead)
        soon = now + (now - float(first.was))
        reached = min(1.0, (at + ahead) / (self.step.warm * total)) if self.step.warm else 1.0
        wanted = math.log(float(first.began)) * (1 - reached) + math.log(self.target) * reached
        off = max(-FAR, min(FAR, soon - wanted)) / FAR
        pace = min(PACE / total, FASTEST) * min(EVERY, total)
        return float(first.price) * math.exp(pace * off)


def order_of(found: list[Link], alone: str) -> Note:
    """A note on the reordered hidden units, or on the reason why none were."""
    if not found:
        return Note("", "skipped", f"hidden units are not reordered: {alone}")
    first = ", ".join(link.rows[0].removesuffix(".weight") for link in found)
    return Note("", "arranged", f"hidden units reordered: those of {first}")


def cleared(view: View, forms: Mapping[str, Form], layers: Collection[str]) -> tuple[dict[str, Form], Note]:
    """The forms without the dead units of these layers, if the model can be traced; and a note with the
    count."""
    part = view.part
    model = part.plain(forms).eval().cpu()
    state = {name: uncoded(form) for name, form in {**view.forms, **forms}.items()}
    found = [s.name for s in view.sites.values() if s.layer in layers and view.inside(s.name)]
    names = [name for name in found if zeroed(state[name], torch.ones(state[name].shape)) is not None]
    movable = [name for name in names if isinstance(state[name], Dense)]
    try:
        changed = clear(model, move(example_inputs(part.task, model), torch.device("cpu")), names, movable)
    except RefusedError as error:
        return dict(forms), Note("", "skipped", f"dead units are not cleared: {error}")
    count = sum(int(((state[name].decode() != 0) & (value == 0)).sum()) for name, value in changed.items())
    new = {n: form for n, value in changed.items() if (form := zeroed(state[n], value)) is not None}
    text = f"{count} weights and biases of dead units set to zero"
    return {**forms, **new}, Note("", "cleared", text, {"count": count})


def zeroed(form: Form, value: Tensor) -> Form | None:
    """The form with zeros where `value` has zeros; a Dense form takes all of `value`. None if single elements
    of the form cannot be set to zero."""
    return Dense(value.cpu().clone()) if isinstance(form, Dense) else form.zeroed(value == 0)


def zeros(site: Site, form: Form) -> Note:
    value = form.decode()
    rows = to_rows(value, site.axis) != 0
    share = float(rows.float().mean())
    text = f"{100 * share:.3g} % are not zero; {int((~rows.any(1)).sum())} of {len(rows)} rows"
    text += f" and {int((~rows.any(0)).sum())} of {rows.shape[1]} columns are empty"
    return Note(site.name, "done", text, {"nonzero": share})


def nbytes_of(forms: Mapping[str, Form]) -> int:
    """Bytes of these forms once entropy-coded."""
    return sum(min(Entropy().code(form).nbytes, form.nbytes) for form in forms.values())
