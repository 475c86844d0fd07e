"""Largest: the rows of a table that fit on a screen, and what the others come to.

largest layers first, by bytes      the rest in one line      buffers in one line
and notes that differ in their numbers alone, as one: "no coder shortens its 12 to 116 bytes"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tersor.report.console import whole

Facts = Mapping[str, Any]
ROWS = 25  # of a table on a terminal; --all shows every row, report.json and --json have them too
BUFFER = "buffer"  # the kind of such a site
# A number that is a word of its own, and no part of a name such as layer1.0.conv2.
NUMBER = re.compile(r"(?<![\w.,\-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w]|[.,\-]\w)")


class Rows(NamedTuple):
    """Names of sites: shown in rows, counted in a line, and buffers, counted in another."""

    shown: list[str]
    more: list[str]
    buffers: list[str]


def largest(sites: Mapping[str, Facts], every: bool = False) -> Rows:
    """The sites by their bytes, largest first; `every`: all of them are shown. One site that is left is
    shown too, since a line that counts it would be as long."""
    order = sorted(sites, key=lambda name: -stored(sites[name]))
    if every:
        return Rows(order, [], [])
    buffers = [name for name in order if sites[name].get("kind") == BUFFER]
    buffers = buffers if len(buffers) > 1 else []
    rest = [name for name in order if name not in set(buffers)]
    most = ROWS if len(rest) != ROWS + 1 else ROWS + 1
    return Rows(rest[:most], rest[most:], buffers)


def stored(site: Facts) -> float:
    """The bytes of a site's facts."""
    return float(site["nbytes"] if "nbytes" in site else site["stored"] / 8)


def folded(rows: Rows, sites: Mapping[str, Facts], noun: str) -> Iterator[str]:
    """The lines under a table: what is in no row of it."""
    for names, what in ((rows.more, f"more {noun}s"), (rows.buffers, "buffers")):
        if names:
            nbytes = round(sum(stored(sites[name]) for name in names))
            yield f"{whole(len(names))} {what}, {whole(nbytes)} bytes"
    if rows.more or rows.buffers:
        yield "--all shows every row"


def summed(texts: Iterable[str]) -> list[str]:
    """The texts, those with equal words as one, in the order of the first: numbers that differ become a
    range, and the number of texts is told."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(words(text), []).append(text)
    return [ranged(same) + (f" ({len(same)} times)" if len(same) > 1 else "") for same in alike.values()]


def words(text: str) -> str:
    """A text without its numbers."""
    return NUMBER.sub("#", text)


def ranged(same: Sequence[str]) -> str:
    """One text for several with equal words: "12 to 116" where their numbers differ."""
    columns = list(zip(*(NUMBER.findall(text) for text in same), strict=True))
    found = iter(between(column) for column in columns)
    return NUMBER.sub(lambda _: next(found), same[0])


def between(numbers: Sequence[str]) -> str:
    low, high = (pick(numbers, key=lambda text: float(text.replace(",", ""))) for pick in (min, max))
    return low if low == high else f"{low} to {high}"
