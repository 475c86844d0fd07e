"""Search table: what `tersor compress` prints: every trial, then the one that was chosen, as of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.report.console import percent, seconds, whole
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
    if short := [row for row in search["trials"] if row.get("short")]:
        each = "; ".join(f"{row['name']}: {row['short']:.2g} bits" for row in short)
        yield f"trained too short for the size that they were to reach ({each}): more --epochs reach it"
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
        drop = in_digits(item["drop"][0], search)
        yield f"not taken: {item['name']}, which drops by {drop} on the evaluation set"
    if "export" in facts:
        yield f"exported: {facts['export']['text']}"
    yield f"recipe: {search['recipe']}"
    yield f"written to {facts['out']}: model.tersor, recipe.lock.yaml, report.json, search.html"


def reasons(search: Facts) -> list[str]:
    """Why trials were refused, each reason once."""
    return [*dict.fromkeys(row["why"] for row in search["trials"] if row["why"])]


def trials(search: Facts) -> RenderableType:
    """One row a trial, in the order in which they ran."""
    table = grid(*(f">{text}" if right else text for text, right in headings(search)))
    for row in search["trials"]:
        table.add_row(*cells(row, search))
    return table


def headings(search: Facts) -> list[tuple[str, bool]]:
    """The headings of the table of trials, and whether a column has numbers."""
    unit = search["unit"]
    fast = [("times as fast", True)] if timed(search) else []
    return [
        ("trial", False), (f"drop{unit and f', {unit}'}", True), ("95 % interval", False), ("bytes", True),
        ("of given", True), *fast, ("time", True), ("over the budget", False),
    ]  # fmt: skip


def cells(row: Facts, search: Facts) -> list[str]:
    """A row of the table of trials."""
    name = f"{row['name']} *" if row["name"] == search["best"] else row["name"]
    if row["why"]:
        number = reasons(search).index(row["why"]) + 1
        return [name, *[""] * (4 + timed(search)), seconds(row["seconds"]), f"refused ({number})"]
    amount, *ends = row["drop"]
    fast = [f"{row['latency']['ratio'][0]:.2f}"] if timed(search) else []
    return [
        name, in_digits(amount, search), " to ".join(in_digits(end, search) for end in ends),
        whole(row["nbytes"]), percent(row["nbytes"] / search["given_nbytes"], 1), *fast,
        seconds(row["seconds"]), ", ".join(row["over"]),
    ]  # fmt: skip


def in_digits(drop: float, search: Facts) -> str:
    """A drop: points have two decimals, and a metric's own unit, which may be small, has three digits."""
    return f"{drop:.2f}" if search["unit"] else f"{drop:.3g}"


def timed(search: Facts) -> bool:
    """Whether trials were timed in a runtime."""
    return any(row.get("latency") for row in search["trials"])
