"""Unit groups: what may be cut from a model, as a table: families of units, and what keeps the rest.

family    units with the same slices: their number, the parameters that go with the first one and with all
          together, the tensors they are cut from
exact     its removal equals a zero; counted: a normalizer counts it, so only exact=false cuts it
kept      the indices that cannot be cut, by the reason
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.core.state import State
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.model.channels.groups import Family
from tersor.model.part import check_parts, naming_parts
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.report.console import percent, whole
from tersor.report.largest import ROWS
from tersor.report.table import grid
from tersor.steps.units import Units, units_of

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]
TENSORS = 4  # named for each family


def described(given: State, task: Task | None) -> dict[str, Any]:
    """The facts: families that `slim` may cut, exact and counted ones, and the reasons of what stays."""
    if task is None:
        raise SettingError("show --groups: needs inputs to trace the model with. Give --task")
    view = View(given, task, "show", "0", 0, Observer())
    check_parts(view.plain(), task)
    with naming_parts(view.plain, task):
        exact, every = (units_of(view, "*", exact) for exact in (True, False))
    known = {tensor for family in exact.families for tensor in places(family)}
    families = [*(fact(exact, f) for f in exact.families),
                *(fact(every, f) for f in every.families if not set(places(f)) <= known)]  # fmt: skip
    return {
        "model": {"parameters": sum(math.prod(view.shape(name)) for name in parameters(view))},
        "families": families,
        "kept": every.groups.stays(name for name, site in view.sites.items() if site.is_weight),
        "faults": [{"module": fault.path, "why": fault.why} for fault in every.own.faults],
        "without_rule": dict(every.groups.walk.unknown),
    }  # fmt: skip


def parameters(view: View) -> list[str]:
    return [name for name, site in view.sites.items() if site.is_parameter]


def places(family: Family) -> list[tuple[str, int, int]]:
    return [(each.tensor, each.axis, int(each.at.min())) for each in family.slices]


def fact(units: Units, family: Family) -> dict[str, Any]:
    one, every = gone(units.view, family, 1), gone(units.view, family, family.size)
    return {
        "family": family.name, "units": family.size, "parameters": one, "together": every,
        "counted": list(family.flags), "tensors": [f"{s.tensor}:{s.axis}" for s in family.slices],
    }  # fmt: skip


def gone(view: View, family: Family, count: int) -> int:
    """The parameters that go with the first `count` units. What two axes of a tensor share counts once: units
    of a recurrent layer are rows and columns of one matrix."""
    lost: dict[str, dict[int, set[int]]] = {}  # tensor -> axis -> indices
    for tensor, axis, at in family.slices:
        if view.sites[tensor].is_parameter:
            lost.setdefault(tensor, {}).setdefault(axis, set()).update(at[:count].ravel().tolist())
    return sum(
        math.prod(shape) - math.prod(n - len(axes.get(axis, ())) for axis, n in enumerate(shape))
        for tensor, axes in lost.items()
        if (shape := view.shape(tensor))
    )


def tables(facts: Facts, every: bool = False) -> Iterator[RenderableType]:
    """The facts as tables for people: the families with the most parameters first, or `every` family."""
    total = max(facts["model"]["parameters"], 1)
    table = grid("family", ">units", ">parameters a unit", ">share", "cut", "of")
    families = sorted(facts["families"], key=lambda family: -family["together"])
    for family in families if every else families[:ROWS]:
        share = family["together"] / total
        how = f"counted by {', '.join(family['counted'])}" if family["counted"] else "exact"
        more = len(family["tensors"]) - TENSORS
        names = ", ".join(family["tensors"][:TENSORS]) + (f" and {more} more" if more > 0 else "")
        counts = whole(family["units"]), whole(family["parameters"]), percent(share)
        table.add_row(family["family"], *counts, how, names)
    yield table
    if len(families) > ROWS and not every:
        yield f"{len(families) - ROWS} more families: --all shows them"
    if not facts["families"]:
        yield "no unit can be cut"
    if facts["kept"]:
        listed = (f"{reason} ({whole(count)})" for reason, count in facts["kept"].items())
        yield f"indices that stay: {', '.join(listed)}"
    for fault in facts["faults"]:
        yield f"kept for the code of {fault['module'] or 'the model'}: {fault['why']}"
