"""Search table: what `tersor compress` prints: every trial, then the one that was chosen, as of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.report.console import percent, ranged, seconds, whole
from tersor.report.table import grid, headline

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts of a search."""
    search = facts["search"]
    yield trials(search)
    for number, why in enumerate(reasons(search), 1):
        yield f"refused ({number}): {why}"
    yield f"decided by {search['decided_by']}; budget {search['budget']}; aim {search['aim']}"
    if search["stopped"]:
        yield "the time was up before all trials had run: the trials stay, --resume continues"
    if search["untrained"]:
        yield f"nothing was trained: {search['untrained']}"
    yield f"best: {search['best']}"
    yield headline(facts)
    for item in search["beyond"]:
        if "latency" in item:
            yield f"not taken: {item['name']}, which was over the budget when it was timed again"
            continue
        yield f"not taken: {item['name']}, which drops by {item['drop'][0]:.2f} on the evaluation set"
    if "export" in facts:
        yield f"exported: {facts['export']['text']}"
    yield f"recipe: {search['recipe']}"
    yield f"written to {facts['out']}: model.tersor, recipe.lock.yaml, report.json"


def reasons(search: Facts) -> list[str]:
    """Why trials were refused, each reason once."""
    return [*dict.fromkeys(row["why"] for row in search["trials"] if row["why"])]


def trials(search: Facts) -> RenderableType:
    """One row a trial, in the order in which they ran."""
    unit, why = search["unit"], reasons(search)
    timed = any(row.get("latency") for row in search["trials"])
    fast = [">times as fast"] if timed else []
    table = grid(
        "trial", f">drop{unit and f', {unit}'}", "95 % interval", ">bytes", ">of given", *fast, ">time",
        "over the budget",
    )  # fmt: skip
    for row in search["trials"]:
        name = f"{row['name']} *" if row["name"] == search["best"] else row["name"]
        if row["why"]:
            number = why.index(row["why"]) + 1
            table.add_row(name, *[""] * (4 + timed), seconds(row["seconds"]), f"refused ({number})")
            continue
        amount, *ends = row["drop"]
        fast = [f"{row['latency']['ratio'][0]:.2f}"] if timed else []
        table.add_row(
            name, f"{amount:.2f}", ranged(ends, 2, "to"), whole(row["nbytes"]),
            percent(row["nbytes"] / search["given_nbytes"], 1), *fast, seconds(row["seconds"]),
            ", ".join(row["over"]),
        )  # fmt: skip
    return table
