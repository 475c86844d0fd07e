"""Check lines: the facts of a dry run, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tersor.errors import few
from tersor.report.console import settings

FEW = 6  # sites named in a line

Facts = Mapping[str, Any]


def lines(checked: Facts) -> Iterator[str]:
    """The facts as lines for people; `checked` holds them under "steps"."""
    found = checked["steps"]
    for number, facts in enumerate(found, 1):
        yield f"{number} {facts['step']}: {facts['what']}"
        if facts["settings"]:
            yield f"  {settings(facts['settings'])}"
        if facts["needs"]:
            yield f"  needs {facts['needs']}"
        if "sites" in facts:
            yield f"  works on {counted(facts['sites'])}" if facts["sites"] else "  changes no weight"
        yield from (f"  {note}" for note in facts["notes"])
        for warning in facts["warnings"]:
            where = f" ({counted(warning['sites'])})" if warning["sites"] else ""
            yield f"  warning: {warning['text']}{where}"
    count = sum(len(facts["warnings"]) for facts in found)
    yield f"{len(found)} steps, {count} warning{'' if count == 1 else 's'}"


def counted(sites: list[str]) -> str:
    """Some of the names, and their number if not all are shown."""
    return (f"{len(sites)} sites: " if len(sites) > FEW else "") + few(sites, FEW)
