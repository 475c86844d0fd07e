"""Shared ranks: the ranks of all layers together, so that a share of their cost is kept at the least damage.

cost      numbers stored, or multiply-accumulates: numbers times the positions that a layer runs at
damage    E|g|^2 E|(w - w') x|^2 / O: how far the error of a layer's outputs moves the model's, if it is
          spread evenly over the O outputs; g are their gradients (model/curvature.py). Without calibration
          batches |w - w'|^2 / |w|^2
choice    the least sum of damages within the budget (maths/choices.py); a layer may stay whole
With the same share for each, a narrow layer, such as the last, would lose most of its directions.
Cost: the singular values of each weight, and a pass forward and backward over the calibration batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from tersor.core.view import View
from tersor.errors import RefusedError
from tersor.maths.choices import within
from tersor.model.curvature import curvatures
from tersor.model.layer_macs import Reads
from tersor.record.events import Note
from tersor.steps.factor_ranks import ranks_for, spectra, stored, work

# Shares of a weight that are looked at; ranks between two of them do nearly the same damage.
SHARES = (*(2 ** (-k / 2) / 48 for k in range(12, 0, -1)), *(k / 48 for k in range(1, 48)))

Ranks = tuple[int, ...] | None  # None: the weight stays whole


class Ways(NamedTuple):
    """The ways to store one weight, from the cheapest on; the last is whole."""

    ranks: tuple[Ranks, ...]
    costs: tuple[int, ...]
    damages: tuple[float, ...]
    weighed: bool = False  # by how far the model's outputs move

    def times(self, factor: float, weighed: bool) -> Ways:
        return self._replace(damages=tuple(factor * damage for damage in self.damages), weighed=weighed)


class Use(NamedTuple):
    """How a layer uses the numbers of its weight."""

    positions: int = 1  # of its outputs; 1 if numbers count as such
    reads: Reads = Reads()


def ways_of(step: Any, method: str, w: Tensor, gram: Tensor | None, turned: bool, *, use: Use) -> Ways:
    """`gram`: second moment of the layer's inputs. `turned`: these are axis 0 of the weight. `use`: for costs
    in multiply-accumulates."""
    positions, reads = use
    tails = spectra(method, w, gram, turned)
    found: dict[int, tuple[tuple[int, ...], float]] = {}
    for share in (*SHARES, step.keep or 0.5):
        at = replace(step, keep=share)
        ranks = ranks_for(at, method, w, tails)
        cost = round(work(method, w, ranks, reads) * positions)
        if stored(method, w, ranks) < w.numel() and cost < w.numel() * positions:
            # Of a CP no error is known beforehand: that of Tucker factors of the same share stands for it.
            like = ranks_for(at, "tucker", w) if method == "cp" else ranks
            lost = (float(tail[min(r, len(tail) - 1)]) for tail, r in zip(tails, like, strict=True))
            found.setdefault(cost, (ranks, sum(lost)))
    each = sorted(found.items())
    return Ways(
        (*(ranks for _, (ranks, _) in each), None),
        (*(cost for cost, _ in each), w.numel() * positions),
        (*(lost for _, (_, lost) in each), 0.0),
    )


class Seen(NamedTuple):
    """What the calibration batches show of a layer."""

    inputs: float  # E|x|^2
    outputs: float  # E|w x|^2


def seen(w: Tensor, gram: Tensor | None) -> Seen | None:
    """w [O, I]; None without a gram."""
    if gram is None:
        return None
    w64, moment = w.double(), gram.double()
    return Seen(float(moment.trace()), float(((w64 @ moment) * w64).sum()))


def sensitivities(view: View, of: Mapping[str, Seen | None]) -> dict[str, tuple[float, bool]]:
    """(E|g|^2 E|w x|^2 / O of each layer, by its weight; whether it is known): how far the model's
    outputs move if all that a layer gives is lost. E|g|^2 = tr F / E|x|^2, F the curvature's factor of rows.

    Where inputs or gradients are not seen, it is the geometric mean of the others; 1 if there are none."""
    found, part = dict[str, float](), view.part
    sites = [view.sites[name] for name, each in of.items() if each is not None]
    # Only traces are needed, so diagonals suffice: they take hardly any time and memory.
    try:
        known = curvatures(part.plain(), part.task, sites, widest=0) if sites else {}
    except RefusedError:  # the note says of how many weights the effect is not known
        known = {}
    for name, (rows, _) in known.items():
        if (each := of[name]) is not None and each.inputs > 0:
            found[name] = float(rows.sum()) / each.inputs * each.outputs / len(rows)
    fine = {name: size for name, size in found.items() if 0 < size < math.inf}
    typical = math.exp(sum(map(math.log, fine.values())) / len(fine)) if fine else 1.0
    return {name: (fine.get(name, typical), name in fine) for name in of}


class Shared(NamedTuple):
    """The ranks of each weight, and what is to be said about all."""

    ranks: Mapping[str, Ranks]
    notes: tuple[Note, ...]


def shared(ways: Mapping[str, Ways], keep: float, unit: str) -> Shared:
    """The ranks with the least damage that keep this share of all costs; the lowest of all if even these keep
    more. `unit`: of costs."""
    if not ways:
        return Shared({}, ())
    whole = sum(each.costs[-1] for each in ways.values())
    least = sum(each.costs[0] for each in ways.values())
    picks = (
        (0,) * len(ways)
        if least >= keep * whole
        else within([each.costs for each in ways.values()], [w.damages for w in ways.values()], keep * whole)
    )
    found = {name: each.ranks[at] for (name, each), at in zip(ways.items(), picks, strict=True)}
    kept = sum(each.costs[at] for each, at in zip(ways.values(), picks, strict=True))
    stay = sum(ranks is None for ranks in found.values())
    text = f"{100 * kept / whole:.1f} % of {whole:,} {unit} are kept"
    text += f", the least possible: {100 * keep:.3g} % were asked for" if least > keep * whole else ""
    text += f"; {stay} of {len(found)} weights stay whole" if stay else ""
    alike = sum(not each.weighed for each in ways.values()) if len(ways) > 1 else 0
    text += f"; of {alike} weights the effect on the model's outputs is not known" if alike else ""
    return Shared(found, (Note("", "ranks", text, {"kept": kept, "of": whole, "whole": stay}),))
