"""Slim budget: how many units each family keeps, so that a budget is met at the least damage.

global   each unit at its price: maths/allocation.py over the costs of model/channels/costs.py
family   the same share of units in every family
latency  costs are measured times of operators (slim_latency.py); then the cut network itself is timed beside
         the whole one, and the target is corrected until the measured time fits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersor.errors import RefusedError
from tersor.maths.allocation import Cost, allocate
from tersor.model.channels import costs
from tersor.model.channels.groups import Family, Groups
from tersor.model.channels.own_module import OwnModule, Plan
from tersor.record.events import Note
from tersor.steps.slim_latency import Latency
from tersor.steps.unit_ranking import Ranking
from tersor.steps.units import Settings, Units

LEAST = 2  # units that stay in a family: a dimension of size 1 may be squeezed or broadcast
WITHIN = {"latency": 0.05}  # of the target; 2 % for the others
TRIES = 4  # cut networks that are timed
TIMED = 16  # counts of one family that are timed
OPTIONS, FEWEST = 1024, 16  # counts of all families together, and at least of each


PROGRAM = (
    "the code fixes widths; an exported program has no such code: give torch.export.export(model, ...) "
    "as the model"
)


class Choice(NamedTuple):
    """Units to keep, by family; the plan that removes the others; and a note on the budget."""

    counts: list[int]
    plan: Plan
    gone: NDArray[np.bool_]  # of the components
    note: Note


def chosen(
    step: Settings, units: Units, ranking: Ranking, share: float, start: float | None
) -> tuple[Choice, float]:
    """(the choice for `share` of the cost `start`, that cost). RefusedError if it cannot be met and the step
    does not take the nearest."""
    groups, families = units.groups, units.families
    latency = Latency(units, step) if step.of == "latency" else None
    cost = latency.cost if latency is not None else cost_of(step.of, units)
    most = TIMED if latency is not None else max(OPTIONS // len(families), FEWEST)
    options = [
        allowed(family.size, step.multiple // math.gcd(step.multiple, channels(units, family)), most,
                latency is not None)
        for family in families
    ]  # fmt: skip
    damages = [
        [float(ranking.damage[f.name][f.size - n]) for n in some]
        for f, some in zip(families, options, strict=True)
    ]
    whole = cost.total([family.size for family in families])
    before, start = start, whole if start is None else start

    def at(target: float) -> Choice:
        counts = shared(step.per, options, damages, cost, target)
        pairs = zip(families, counts, strict=True)
        gone = groups.removed(ranking.order[f.name][: f.size - n] for f, n in pairs)
        return Choice(counts, units.own.plan(groups, gone), gone, Note("", "budget", ""))

    if latency is None:
        choice = at(start * share)
        reached = cost.total(choice.counts)
    else:
        start = latency.ms if before is None else before  # rounds share one budget, of the first model
        choice, ratio = timed(latency, at, whole, min(share * start / latency.ms, 1.0))
        reached = ratio * latency.ms
    least = cost.total([some[0] for some in options]) / whole
    samples = units.own.samples if step.of == "macs" else 1  # the trace is of a few samples at once
    within = WITHIN.get(step.of, 0.02)
    text = f"{step.of}: {reached / start:.1%} kept, {share:.1%} asked"
    facts = {"of": step.of, "before": start / samples, "after": reached / samples,
             "asked": start * share / samples, "least": least}  # fmt: skip
    if latency is not None:
        text += f"; {start:.4f} ms before, {reached:.4f} after in {step.runtime}, batch {step.batch}"
    if reached > start * share * (1 + within):
        text += "" if latency is not None else f"; removing all units that may go leaves {least:.1%}"
        if step.multiple > 1 and all(len(some) == 1 for some in options):
            text += f"; no family has more than multiple={step.multiple} channels"
        if step.unmet == "refuse":
            keep = min(math.ceil(100 * reached / start), 99) / 100
            raise RefusedError(
                f"slim: {text}. The nearest that can be had keeps {reached / start:.1%}: give keep={keep:g}, "
                f"or unmet=nearest. Most of the rest stays for these reasons: "
                f"{', '.join(held(groups)[:4])}{more(groups)}{fixed(units.own)}"
            )
    return choice._replace(note=Note("", "budget", text, facts, timed=latency is not None)), start


def timed(
    latency: Latency, at: Callable[[float], Choice], whole: float, share: float
) -> tuple[Choice, float]:
    """The choice whose measured time is the nearest to its share, and that share."""
    target, best = whole * share, None
    for _ in range(TRIES):
        choice = at(target)
        ratio = latency.ratio(choice.plan)
        if best is None or abs(math.log(ratio / share)) < abs(math.log(best[1] / share)):
            best = choice, ratio
        if abs(ratio / share - 1) <= WITHIN["latency"]:
            break
        target *= share / ratio
    return best  # type: ignore[return-value]


def cost_of(of: str, units: Units) -> Cost:
    if of == "macs":
        return costs.macs(units.groups, units.families)
    if of == "units":
        return costs.units(units.families)
    each = None
    if of == "bytes":
        each = {n: form.nbytes / max(math.prod(form.shape), 1) for n, form in units.view.forms.items()}
    return costs.parameters(units.groups, units.families, each)


def channels(units: Units, family: Family) -> int:
    """The channels of one unit in every weight that makes or reads it: a head has its width, a group its
    size, another unit 1."""
    sites = units.view.sites
    return math.gcd(*(each.at.shape[1] for each in family.slices if sites[each.tensor].is_weight)) or 1


def allowed(size: int, multiple: int, most: int, timed: bool) -> list[int]:
    """The counts of units that a family may keep, about `most`. Where each is timed, multiples of 8."""
    step = math.lcm(multiple, 8 if timed and size > most else 1)
    step *= -(-size // (most * step))
    found = [n for n in range(min(LEAST, size), size) if n % step == 0]
    return [*found, size]


def shared(
    per: str, options: Sequence[list[int]], damages: Sequence[list[float]], cost: Cost, target: float
) -> list[int]:
    if per == "family":
        return same_share(options, cost, target)
    return list(allocate(options, damages, cost, target).counts)


def same_share(options: Sequence[list[int]], cost: Cost, target: float) -> list[int]:
    """The counts nearest to one share for all families, the largest share within the target."""
    low, high = 0.0, 1.0
    best = [some[0] for some in options]
    for _ in range(40):
        share = (low + high) / 2
        counts = [nearest(some, share) for some in options]
        if cost.total(counts) <= target:
            low, best = share, counts
        else:
            high = share
    return best


def nearest(options: list[int], share: float) -> int:
    return min(options, key=lambda n: abs(n - share * options[-1]))


def more(groups: Groups) -> str:
    counted = any("counts it" in reason for reason in held(groups))
    return "; exact=false also cuts what a normalizer counts" if counted else ""


def fixed(own: OwnModule) -> str:
    """What a model can become whose code fixes widths; "" if it fixes none."""
    return f"; {PROGRAM}" if own.faults else ""


def held(groups: Groups) -> list[str]:
    """The reasons for which indices stay, the most frequent first."""
    return list(groups.stays(groups.walk.tensors)) or ["where"]
