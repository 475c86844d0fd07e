"""Search page: what `tersor compress` tried, drawn: the drop of each trial over bytes and over speed.

point     a trial, with the 95 % interval of its drop; the budget is drawn as lines
shown     drops up to three times the bound; those above are at the upper edge, hollow
bytes     on a logarithmic axis
table     all trials with their recipes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tersor.report.console import percent, whole
from tersor.report.page import template
from tersor.report.search_table import cells, headings, in_digits, reasons, timed
from tersor.report.treemap import Box

Facts = Mapping[str, Any]
SIZE = Box(0, 0, 1000, 400)
PLOT = Box(70, 14, 910, 340)  # the rest is for the axes
HIGHEST = 3.0  # times the bound on the drop
TICKS = 5
STEPS = (1.0, 2.0, 5.0)  # of an axis, times a power of 10


@dataclass(frozen=True)
class Axis:
    """Values along a side of the plot."""

    low: float
    high: float
    begin: float  # the place of `low`
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is drawn; values outside are at the edge, and NaN is at the beginning."""
        if math.isnan(value):
            return self.begin
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values to write at the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**power for power in powers for step in STEPS]
        else:
            rough = (self.high - self.low) / TICKS or 1.0
            power = 10.0 ** math.floor(math.log10(rough))
            step = next((s * power for s in STEPS if s * power >= rough), 10 * power)
            values = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


class Measure(NamedTuple):
    """What a plot has along its lower side."""

    title: str
    bound: str  # its word in the facts' bounds
    of: Callable[[Facts], float]
    text: Callable[[float], str]


SIZES = Measure("bytes of the file", "nbytes", lambda row: row["nbytes"], "{:,.0f}".format)
SPEEDS = Measure(
    "times as fast as the given model", "ratio", lambda row: row["latency"]["ratio"][0], "{:.3g}".format
)


def page(search: Facts) -> str:
    """The page for the facts of a search (search/compress.py)."""
    done = [row for row in search["trials"] if not row["why"]]
    measures = [SIZES, SPEEDS] if timed(search) else [SIZES]
    text = template("search.html").render(
        search=search, size=SIZE, area=PLOT, summary=summary(search), reasons=reasons(search),
        plots=[plot(measure, done, search) for measure in measures if done],
        headings=[*headings(search), ("recipe", False)],
        rows=[[*cells(row, search), row["recipe"]] for row in search["trials"]],
    )  # fmt: skip
    return str(text)


def summary(search: Facts) -> str:
    """What was chosen."""
    count = len(search["trials"])
    best = next((row for row in search["trials"] if row["name"] == search["best"]), None)
    if best is None:
        return f"None of {count} trials is within the budget."
    share = percent(best["nbytes"] / search["given_nbytes"], 1)
    return (
        f"Best of {count} trials: {best['name']}: {whole(best['nbytes'])} bytes, {share} of the given "
        f"weights, drop {in_digits(best['drop'][0], search)} on the {search['decided_by']} that decide."
    )


def plot(measure: Measure, done: Sequence[Facts], search: Facts) -> dict[str, Any]:
    """Points, lines and ticks of one plot."""
    bounds, upward = search["bounds"], drops(done, search["bounds"]["drop"])
    bound, most = bounds[measure.bound], bounds["drop"]
    values = [measure.of(row) for row in done] + ([] if bound is None else [bound])
    across = Axis(0.9 * min(values), 1.1 * max(values), PLOT.x, PLOT.x + PLOT.w, log=True)
    return {
        "title": measure.title,
        "points": [
            {
                "kind": kind(row, search, upward), "x": across.place(measure.of(row)),
                "y": [upward.place(drop) for drop in row["drop"]],
                "title": f"{row['name']}: drop {in_digits(row['drop'][0], search)}, "
                + measure.text(measure.of(row)),
            }
            for row in done
        ],
        "across": [(across.place(tick), measure.text(tick)) for tick in across.ticks()],
        "up": [(upward.place(tick), f"{tick:g}") for tick in upward.ticks()],
        "bound": None if bound is None else across.place(bound),
        "most": None if most is None else upward.place(most),
    }  # fmt: skip


def drops(done: Sequence[Facts], bound: float | None) -> Axis:
    """The axis of the drop, up to three times its bound."""
    ends = [end for row in done for end in row["drop"] if math.isfinite(end)]
    low = min(0.0, *ends)
    high = max(0.0, *ends) if bound is None else HIGHEST * bound
    return Axis(low, high if high > low else low + 1.0, PLOT.y + PLOT.h, PLOT.y)


def kind(row: Facts, search: Facts, upward: Axis) -> str:
    """The class of a point."""
    if row["name"] == search["best"]:
        return "best"
    if row["drop"][0] > upward.high:
        return "beyond"
    return "over" if row["over"] else "within"
