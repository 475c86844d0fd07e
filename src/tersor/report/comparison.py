"""Comparison: the facts of `tersor export`, `eval` and `compare`, as tables and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.report.console import percent, ranged, seconds, whole
from tersor.report.table import accuracy_rows, grid, latency_rows, scaled

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]


def exported_lines(facts: Facts) -> Iterator[str]:
    """The facts of an export."""
    given, made = facts["from"], facts["to"]
    yield line(given)
    said = facts["text"].removeprefix(f"{facts['path']}, ")  # the step's words begin with the name
    yield f"{made['name']}, for {made['runtime']}: {said}"
    if facts.get("agree") is not None:
        yield f"equal decisions on the example: {percent(facts['agree'])}"


def line(file: Facts) -> str:
    """A candidate and its bytes."""
    what = " in safetensors" if file["kind"] == "model" or file.get("alone") else ""
    return f"{file['name']}: {whole(file['nbytes'])} bytes{what}"


def evaluated_lines(facts: Facts) -> Iterator[str]:
    """The facts of an evaluation."""
    share = facts["unit"] == "points"
    times, digits, unit = (100, 2, " %") if share else (1, 4, "")
    value, *within = scaled(facts["value"], times)
    lower = ", lower is better" if facts["better"] == "lower" else ""
    yield line(facts["file"])
    yield (
        f"{facts['metric']} {value:.{digits}f}{unit} (95 %: {ranged(within, digits, 'to')}){lower}, "
        f"n = {whole(facts['n'])}, task {facts['task']}"
    )
    yield f"scored in {seconds(facts['seconds'])}"


def compared_tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts of a comparison."""
    yield f"A  {line(facts['a'])}"
    yield f"B  {line(facts['b'])}"
    table = grid("", ">A", ">B", "")
    before, after = facts["a"]["nbytes"], facts["b"]["nbytes"]
    sizes = f"{before / after:.1f} x smaller" if before >= after else f"{after / before:.1f} x larger"
    decisions = facts["decisions"]
    rows = [*accuracy_rows(facts)]
    if "same" in decisions:
        text = f"{whole(decisions['same'])} of {whole(decisions['of'])} are equal"
        rows.append(("decisions", "", percent(decisions["same"] / max(decisions["of"], 1)), text))
    rows.append(("bytes", whole(before), whole(after), sizes))
    for row in (*rows, *latency_rows(facts)):
        table.add_row(*row)
    yield table
    if facts["strange"]:
        yield (
            f"base is not the network that {facts['strange']} was made from: its weights are others, perhaps "
            "random. Give the file of its weights in place of base"
        )
    if "why" in decisions:
        yield f"decisions are not compared: {decisions['why']}"
    if "latency" in facts:
        yield noise(facts["latency"])


def noise(found: Facts) -> str:
    """What timing A against itself says about the ratio."""
    middle, *within = found["again"]
    text = f"A against itself: {middle:.3f} x (95 %: {ranged(within, 3, 'to')}), batch {found['batch']}"
    text += f", threads {found['threads']}"
    if found["noisy"]:
        return (
            f"{text}. That interval does not hold 1: this machine is too noisy for differences of that size. "
            "End other programs and run it again"
        )
    return text
