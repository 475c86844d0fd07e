"""Slim: remove whole units (channels, heads, neurons), so that the network has fewer of them in every layer.

units    what must be removed together, from the graph of the forward (model/channels)
choose   by importance, within families of like units; families share a budget of multiply-accumulates,
         parameters, bytes or measured latency, hit by an exact price for each unit (maths/allocation.py)
cut      at once, or in rounds with training in between; each cut is proved against the model with zeros
shrink   with a penalty, training first takes the units that go towards zero (slim_penalty.py)
repair   what reads the units is refitted by least squares on calibration batches, without labels
The model stays an instance of its own class, with smaller layers. An exported program stays one, and has no
code that fixes a width (model/program.py). Sources: DepGraph (Fang 2023), ZipLM
(Kurtic 2023), Molchanov 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, few
from tersor.model.changes import Replace
from tersor.model.channels.groups import Groups
from tersor.model.channels.reconstruct import Layer
from tersor.model.frozen import Frozen
from tersor.record.events import Cut, Event, Group, Note
from tersor.runtimes import MOST_THREADS, check_runtime
from tersor.runtimes.latency_table import ORT
from tersor.setting_effects import Above, Only, check_effect
from tersor.settings import check, check_word
from tersor.steps.correction import corrected
from tersor.steps.retrain import Retrain
from tersor.steps.slim_budget import Choice, chosen, fixed, held
from tersor.steps.slim_penalty import parts, shrunk
from tersor.steps.unit_ranking import BY, rank
from tersor.steps.units import LEAST, OUTSIDE, Units, readers_of, units_of

STRONGEST = 50.0  # penalty: exp(-50) is 0 in float32
OF = ("macs", "parameters", "bytes", "units", "latency")


@dataclass(frozen=True, kw_only=True)
class Slim(Retrain):
    """Remove channels, heads and neurons, so that layers get smaller."""

    name: ClassVar[str] = "slim"
    only: ClassVar[Only] = {
        **dict.fromkeys(("rounds", "penalty"), {"epochs": Above(0)}),
        "before": {"penalty": Above(0)},
        **dict.fromkeys(("runtime", "threads", "batch"), {"of": ("latency",)}),
    }
    keep: float = 0.5  # share kept of what `of` names, 0 < keep < 1
    of: str = "macs"  # "macs", "parameters", "bytes" (as stored now), "units", "latency" (measured)
    # Importance: "redundancy" (what the units that stay cannot rebuild), "curvature", "taylor", "activation",
    # "l1", "l2", "median", "norm_scale", "random".
    by: str = "redundancy"
    # Who shares the budget: "global" all families, each unit at its price; "family" the same share in each.
    per: str = "global"
    multiple: int = (
        1  # the channels that a family keeps are a multiple of this (or all): 8 or 16 suit kernels
    )
    exact: bool = True  # only units whose removal equals a zero; false: also those that a normalizer counts
    correct: bool = True  # refit what reads the units, and the statistics of batch norms, without labels
    rounds: int = 1  # cuts, with training after each, until keep is reached
    penalty: float = 0.0  # training shrinks the units that go to exp(-penalty), before they are cut
    before: float = 0.5  # share of `epochs` in which it does; the rest follows the cut
    unmet: str = "refuse"  # if the units that may go do not suffice: "refuse", or take the "nearest"
    runtime: str = "onnxruntime"  # that latency is measured in
    threads: int = 1  # of the runtime
    batch: int = 1  # samples a call

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.keep < 1, self, "keep", "it is the share kept: 0 < keep < 1")
        check_word(self, "of", OF)
        check_word(self, "by", tuple(BY))
        check_word(self, "per", ("global", "family"))
        check(self.multiple >= 1, self, "multiple", "it is a number of channels: 1 or more")
        check(self.rounds >= 1, self, "rounds", "it is a count: 1 or more")
        check(
            0 <= self.penalty <= STRONGEST,
            self,
            "penalty",
            f"0 to {STRONGEST}: units shrink to exp(-penalty)",
        )
        check(0 < self.before <= 1, self, "before", "it is a share of the epochs: above 0, up to 1")
        check_word(self, "unmet", ("refuse", "nearest"))
        check(1 <= self.threads <= MOST_THREADS, self, "threads", f"it is a count: 1 to {MOST_THREADS}")
        check(self.batch >= 1, self, "batch", "it is a count of samples: 1 or more")
        check_effect(self)
        if self.of == "latency":
            check_word(self, "runtime", (ORT,))  # in which single operators can be timed
            check_runtime(self.runtime, self.name)

    @property
    def needs(self) -> Needs:
        loss = Needs.LOSS if self.by == "taylor" else Needs.NOTHING
        return super().needs | Needs.MODEL | Needs.TASK | Needs.WHOLE | loss

    def run(self, view: View) -> Iterator[Group]:
        now, start = view, None
        if (stock := attention_replaced(now)) is not None:
            yield stock
            if stock.key not in view.refused:  # else its heads stay
                now = now.after(stock)
        for number in range(1, self.rounds + 1):
            units = units_of(now, self.where, self.exact)
            if not units.families:
                if self.unmet == "refuse":
                    raise RefusedError(f"slim: there is nothing to cut: {why_nothing(units, self.exact)}")
                yield Group("nothing", left(units, {}))
                return
            ranking = rank(self.by, now, units.families)
            share = self.keep ** (number / self.rounds)
            choice, start = chosen(self, units, ranking, share, start)
            first, rest = parts(self.plan(), self.before if self.penalty else 0.0)
            if self.penalty:
                pulled = shrunk(now, choice.plan, first, self.penalty, f"shrunk {number}")
                yield pulled
                now = now.after(pulled)
            cut = cut_group(f"cut {number}", units, choice)
            yield cut
            if cut.key in view.refused:
                raise RefusedError(f"slim: {view.refused[cut.key]}. Leave layers out with where='*,!NAME'")
            before, now = now, now.after(cut)
            if self.correct:
                fixed = refit_group(
                    f"corrected {number}", before, now, units.groups, choice.gone, self.still(now)
                )
                yield fixed
                now = now.after(fixed)
            if rest.epochs:
                moved, facts = now.train(rest, text=f"slim {number}/{self.rounds}", key=f"slim {number}")
                tuned = Group(
                    f"tuned {number}",
                    (
                        *now.edits(moved),
                        Note("", "trained", f"{rest.epochs:g} epochs", facts),
                        *self.stayed(now),
                    ),
                )
                yield tuned
                now = now.after(tuned)


def attention_replaced(view: View) -> Group | None:
    """nn.MultiheadAttention needs as many channels in its heads as in its stream: a stock one does not."""
    paths = [path for path, module in view.plain().named_modules() if type(module) is nn.MultiheadAttention]
    if not paths:
        return None
    note = Note("", "replaced", f"{len(paths)} nn.MultiheadAttention by ones whose heads can be cut")
    return Group("attention", (*(Replace(path, "attention") for path in paths), note))


def why_nothing(units: Units, exact: bool) -> str:
    families = units.groups.families
    if not any(map(units.view.inside, units.chosen)):
        return f"where names {few(sorted(units.chosen))} alone: {OUTSIDE}"
    if families and all(family.size <= LEAST for family in families):
        sizes = f"{len(families)} families of {LEAST} units or fewer, as many as have to stay"
        return f"there are {sizes}{fixed(units.own)}"
    if families:
        first = next(family for family in families if family.size > LEAST)
        makers = ", ".join(each.tensor for each in first.slices)[:200]
        return f"where leaves out layers that make the same units; those of {first.name} are in {makers}"
    counted = any("counts it" in reason for reason in held(units.groups))
    advice = "; exact=false also cuts what a normalizer counts" if exact and counted else ""
    faults = "".join(f"; {fault.path or 'the model'}: {fault.why}" for fault in units.own.faults[:2])
    return f"every unit is kept by {', '.join(held(units.groups)[:4])}{advice}{faults}{fixed(units.own)}"


def cut_group(key: str, units: Units, choice: Choice) -> Group:
    """The events of a cut, with given indices, and a note on each weight."""
    view, events = units.view, list[Event]()
    shapes: dict[str, list[int]] = {}
    for (name, axis), kept in choice.plan.cuts.items():
        present = view.present(name, axis)
        reads = view.sites[name].kind != "buffer"
        events.append(Cut(name, axis, tuple(present[int(at)] for at in kept), reads))
        shapes.setdefault(name, list(view.shape(name)))[axis] = len(kept)
    proof = "counted" if any(family.flags for family in units.families) else "masked"
    return Group(key, (*events, *choice.plan.sets, *left(units, shapes), choice.note), proof)


def left(units: Units, shapes: dict[str, list[int]]) -> tuple[Note, ...]:
    """A note on each weight: its new shape, or why it keeps the old one."""
    notes, view = [], units.view
    for name, site in view.sites.items():
        if site.is_weight and name in shapes:
            text = f"{list(view.shape(name))} -> {shapes[name]}"
            notes.append(Note(name, "done", text, {"shape": shapes[name]}))
        elif name in units.chosen:
            label = units.groups.walk.tensors.get(name, [])
            why = [f"axis {axis}: {', '.join(reasons)}" for axis in range(min(len(label), 2))
                   if (reasons := units.groups.why_frozen(name, axis))]  # fmt: skip
            if not view.inside(name):
                why = [OUTSIDE]
            if any(each.tensor == name for family in units.families for each in family.slices):
                why = ["the budget keeps its units"]
            notes.append(Note(name, "skipped", f"nothing is cut: {'; '.join(why) or 'its units all stay'}"))
    return tuple(notes)


def refit_group(  # noqa: PLR0917  all six come from the step
    key: str, before: View, now: View, groups: Groups, gone: NDArray[np.bool_], still: Frozen
) -> Group:
    """Edits of what reads fewer units, refitted, and of the statistics of batch norms; frozen ones stay."""
    layers = [
        Layer(reader.path, torch.from_numpy(np.flatnonzero(groups.kept(reader.rows, gone))), reader.norm)
        for reader in readers_of(groups, now) if not groups.kept(reader.columns, gone).all()
    ]  # fmt: skip
    return corrected(key, before, now, layers, still)
