"""Mixed bits: quantize with the bits of each layer chosen by the damage that they do.

damage   tr(F E H E^T) of the layer's rounding error E alone, with the curvature of the model's output
         (model/curvature.py); without data the squared error over the sum of squares
choice   for `mean_bits` the least sum of damages (maths/choices.py); for `max_drop` the fewest bits
         whose drop, measured on calibration or training samples, is within it (drop_search.py)
With `max_drop` layers may stay as they are. Cost: each layer is rounded with each number of bits; one pass
forward and backward over the calibration batches; for `max_drop` some ten passes over the set that decides.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from tersor.core.view import View
from tersor.errors import few
from tersor.forms import Form
from tersor.forms.form import Moments, to_rows
from tersor.maths.choices import Choice, ladder, within
from tersor.model.sites import Site
from tersor.record.events import Edit, Group, Note
from tersor.settings import check
from tersor.steps.drop_search import Deciding, deciding
from tersor.steps.site_rounding import moments

AS_IT_IS = "stays as it is: with the bits allowed the network would lose more than max_drop"


@dataclass(frozen=True)
class Option:
    """One way to store a layer."""

    bits: int  # a weight
    edit: Edit | None  # None: as it is
    damage: float


def check_allowed(step: Any, low: int, high: int) -> None:
    """Refuse lists of bits that are not numbers in order, and targets that they cannot meet."""
    drop, mean = step.max_drop, step.mean_bits
    check(drop is None or 0 < drop < math.inf, step, "max_drop", "it is a loss of the metric: above 0")
    if step.allowed is None:
        return
    words = step.allowed.replace(" ", "").split(",")
    least = max(low, 1 + (step.scheme == "uniform" and step.symmetric))
    fine = all(word.isdigit() and least <= int(word) <= high for word in words) and len(set(words)) > 1
    check(fine, step, "allowed", f"it is two or more numbers of bits, {least} to {high}, such as '8,4'")
    ends = step.levels[0], step.levels[-1]
    text = f"allowed={step.allowed} gives {ends[0]} to {ends[1]} bits a weight"
    check(mean is None or ends[0] <= mean <= ends[1], step, "mean_bits", text)


def mixed(step: Any, view: View) -> Iterator[Group]:
    """The events of a Quantize step with `allowed` bits."""
    sites = [site for site in view.weights(step.where) if 0 not in view.shape(site)]
    decide = None if step.max_drop is None else deciding(view.task, view.model(), step.max_drop, step.name)
    shown = view if decide is None else replace(view, maybe_task=decide.rest, statistics={})
    ways = options(step, shown, sites, decide is not None)
    counts = [view.form(site).decode().numel() for site in sites]
    costs = [[n * option.bits for option in each] for n, each in zip(counts, ways, strict=True)]
    damages = [[option.damage for option in each] for each in ways]
    if decide is None:
        target = sum(step.levels) / 2 if step.mean_bits is None else step.mean_bits
        chosen = within(costs, damages, target * sum(counts))
    else:
        chosen = fewest(view, decide, ways, ladder(costs, damages))
    picked = {site.name: each[at] for site, each, at in zip(sites, ways, chosen, strict=True)}
    edits = {name: option.edit for name, option in picked.items() if option.edit is not None}
    after, events = {name: cast(Form, edit.after) for name, edit in edits.items()}, tuple(edits.values())
    if step.epochs:
        after, events = step.retrained(view, edits)
    notes = [
        with_bits(step, option.bits).note(name, view.forms[name], after[name])
        if option.edit is not None else Note(name, "skipped", AS_IT_IS)
        for name, option in picked.items()
    ]  # fmt: skip
    if decide is not None:
        notes.append(decide.note(view.task, view.model(), view.model(after)))
    notes.append(summary(picked, counts))
    yield Group("all", (*events, *notes))


def options(step: Any, view: View, sites: Sequence[Site], left: bool) -> list[list[Option]]:
    """The ways to store each layer, from the fewest bits on. `left`: also as it is."""
    task = view.maybe_task
    has_data = view.state.given is not None and task is not None and task.calibrate is not None
    curvature = moments(view, list(sites), "output" if has_data else "none", 1)
    found = []
    for number, site in enumerate(sites, 1):
        before = view.form(site)
        w = to_rows(before.decode().double(), site.axis)
        edits = {bits: with_bits(step, bits).edit(view, site) for bits in step.levels}
        ways = [
            Option(bits, edit, damage(w, edit, site, curvature, has_data)) for bits, edit in edits.items()
        ]
        plain = 8 * site.torch_dtype.itemsize
        if left and plain > step.levels[-1]:
            ways.append(Option(plain, None, 0.0))
        found.append(ways)
        view.observer.progress(number, len(sites), site.name)
    return found


def with_bits(step: Any, bits: int) -> Any:
    """The step with the same number of bits everywhere."""
    return replace(step, bits=bits, allowed=None, mean_bits=None, max_drop=None)


def damage(w: Tensor, edit: Edit, site: Site, curvature: Mapping[str, Moments], has_data: bool) -> float:
    """What the rounding error of one layer costs: w [O, I]. It is 0 if no output depends on the layer."""
    error = w - to_rows(cast(Form, edit.after).decode().double(), site.axis)
    if has_data:
        return weighed(error, *curvature[site.name]) if site.name in curvature else 0.0
    return float(error.square().sum() / w.square().sum().clamp_min(1e-300))


def weighed(error: Tensor, rows: Tensor | None, columns: Tensor | None) -> float:
    """tr(F E H E^T) of an error [O, I]; a factor is a matrix, its diagonal, or None for the identity."""
    left = (
        error if rows is None else rows.double() @ error if rows.ndim == 2 else rows.double()[:, None] * error
    )
    right = (
        error
        if columns is None
        else error @ columns.double()
        if columns.ndim == 2
        else error * columns.double()
    )
    return max(0.0, float((left * right).sum()))


def fewest(view: View, decide: Deciding, ways: Sequence[Sequence[Option]], rungs: Sequence[Choice]) -> Choice:
    """The first rung whose drop is within the limit. The last one, where all stay as they are, always is."""

    def fits(number: int) -> bool:
        edits = [each[at].edit for each, at in zip(ways, rungs[number], strict=True)]
        fall = decide.drop(view.model({e.site: cast(Form, e.after) for e in edits if e is not None}))
        view.observer.progress(0, 1, f"allocation {number} of {len(rungs)} loses {fall.amount:+.4g}")
        return fall.high <= decide.limit

    return rungs[bisect_left(range(len(rungs) - 1), True, key=fits)]


def summary(picked: Mapping[str, Option], counts: Sequence[int]) -> Note:
    """The bits of each layer, and their mean over the weights."""
    mean = sum(n * option.bits for n, option in zip(counts, picked.values(), strict=True)) / max(
        sum(counts), 1
    )
    groups: dict[int, list[str]] = {}
    for name, option in picked.items():
        groups.setdefault(option.bits, []).append(name)
    text = "; ".join(f"{bits} bits: {few(names)}" for bits, names in sorted(groups.items(), reverse=True))
    chosen = {name: option.bits for name, option in picked.items()}
    return Note(
        "", "allocated", f"{mean:.2f} bits a weight on average. {text}", {"mean": mean, "bits": chosen}
    )
