"""Shared ranks: the ranks of all layers together, so that a share of their numbers is kept at least damage.

damage   of a layer alone, relative to its output: E|(w - w') x|^2 / E|w x|^2, without calibration batches
         |w - w'|^2 / |w|^2: the energy of the directions that its ranks leave out
choice   the least sum of damages within the budget (maths/choices.py); a layer may stay whole
With the same share for each, a narrow layer, such as the last, would lose most of its directions.
Cost: the singular values of each weight, beside those of its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from tersor.maths.choices import within
from tersor.maths.ranks import energies
from tersor.record.events import Note
from tersor.steps.factor_ranks import as_columns, ranks_for, stored

# Shares of a weight that are looked at; ranks between two of them do nearly the same damage.
SHARES = (*(2 ** (-k / 2) / 48 for k in range(12, 0, -1)), *(k / 48 for k in range(1, 48)))

Ranks = tuple[int, ...] | None  # None: the weight stays whole


class Ways(NamedTuple):
    """The ways to store one weight, from the fewest numbers on; the last is whole."""

    ranks: tuple[Ranks, ...]
    numbers: tuple[int, ...]
    damages: tuple[float, ...]


def ways_of(step: Any, method: str, w: Tensor, gram: Tensor | None, turned: bool) -> Ways:
    """`gram`: second moment of the layer's inputs. `turned`: these are axis 0 of the weight."""
    tails = spectra(method, w, gram, turned)
    found: dict[int, tuple[tuple[int, ...], float]] = {}
    for share in (*SHARES, step.keep or 0.5):
        at = replace(step, keep=share)
        ranks = ranks_for(at, method, w)
        numbers = stored(method, w, ranks)
        if numbers < w.numel():
            # Of a CP no error is known beforehand: that of Tucker factors of the same share stands for it.
            like = ranks_for(at, "tucker", w) if method == "cp" else ranks
            lost = (float(tail[min(r, len(tail) - 1)]) for tail, r in zip(tails, like, strict=True))
            found.setdefault(numbers, (ranks, sum(lost)))
    each = sorted(found.items())
    return Ways(
        (*(ranks for _, (ranks, _) in each), None),
        (*(numbers for numbers, _ in each), w.numel()),
        (*(lost for _, (_, lost) in each), 0.0),
    )


def spectra(method: str, w: Tensor, gram: Tensor | None, turned: bool) -> list[Tensor]:
    """For each rank of the method, at index r the share of the energy that r directions leave out; Tucker's
    error is at most the sum of both (De Lathauwer 2000)."""
    rows = w.flatten(1)
    if method == "svd":
        return [left_out(rows.T, gram) if turned else left_out(rows, gram)]
    if method == "spatial":
        return [left_out(as_columns(w))]
    ins = left_out(w.transpose(0, 1).flatten(1))
    return [left_out(rows, gram), ins]


def left_out(rows: Tensor, gram: Tensor | None = None) -> Tensor:
    """The share of the energy without the first 0, 1, ... directions [min(O, I) + 1]."""
    return F.pad(energies(rows, gram).flip(0).cumsum(0).flip(0), (0, 1))


class Shared(NamedTuple):
    """The ranks of each weight, and what is to be said about all."""

    ranks: Mapping[str, Ranks]
    notes: tuple[Note, ...]


def shared(ways: Mapping[str, Ways], keep: float) -> Shared:
    """The ranks with the least damage that keep this share of all numbers; the lowest of all if even these
    keep more."""
    if not ways:
        return Shared({}, ())
    whole = sum(each.numbers[-1] for each in ways.values())
    least = sum(each.numbers[0] for each in ways.values())
    picks = (
        (0,) * len(ways)
        if least >= keep * whole
        else within([w.numbers for w in ways.values()], [w.damages for w in ways.values()], keep * whole)
    )
    found = {name: each.ranks[at] for (name, each), at in zip(ways.items(), picks, strict=True)}
    kept = sum(each.numbers[at] for each, at in zip(ways.values(), picks, strict=True))
    stay = sum(ranks is None for ranks in found.values())
    text = f"{100 * kept / whole:.1f} % of {whole:,} numbers are kept"
    text += f", the least possible: {100 * keep:.3g} % were asked for" if least > keep * whole else ""
    text += f"; {stay} of {len(found)} weights stay whole" if stay else ""
    return Shared(found, (Note("", "ranks", text, {"kept": kept, "of": whole, "whole": stay}),))
