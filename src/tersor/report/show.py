"""Show: what is in a compressed file: each site's form and bits against the entropy bound, and the ledger.

share = the site's stored bits over those of the file      what remains is names, trees and the ledger
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.core.run import Compressed
from tersor.errors import SiteError
from tersor.model.sites import near
from tersor.report.console import percent, seconds, settings, whole
from tersor.report.facts import facts_of, unusual
from tersor.report.table import bit_rows, grid

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]


def shown(result: Compressed, path: Path, site: str | None = None) -> dict[str, Any]:
    """The facts of a file that was loaded, of the sites that the glob `site` means (default: all)."""
    facts = {"file": {"name": path.name, "nbytes": path.stat().st_size}, **facts_of(result)}
    if site is not None:
        chosen = {name: found for name, found in facts["sites"].items() if fnmatchcase(name, site)}
        if not chosen:
            raise SiteError(f"{path}: no site {site!r}; {near(site, list(result.sites.values()))}")
        facts["sites"] = chosen
    return facts


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The same for a terminal."""
    file = facts["file"]
    yield f"{file['name']}: {whole(file['nbytes'])} bytes, {whole(facts['bits']['weights'])} weights"
    for label, before, after, said in bit_rows(facts):
        yield f"{label}: {before} as given, {after} stored, {said}"
    yield sites(facts)
    if facts["steps"]:
        yield ledger(facts)
    yield f"base {facts['base']}, result {facts['result']}, ledger {facts['ledger']}"


def sites(facts: Facts) -> RenderableType:
    table = grid("site", "shape", "form", ">bits/weight", ">bound", ">share")
    whole_file = 8 * max(facts["file"]["nbytes"], 1)
    for name, site in facts["sites"].items():
        count = max(site["weights"], 1)
        table.add_row(
            name, " x ".join(map(str, site["shape"])) or "scalar", site["form"],
            f"{site['stored'] / count:.3f}", f"{site['bound'] / count:.3f}",
            percent(site["stored"] / whole_file, 1),
        )  # fmt: skip
    return table


def ledger(facts: Facts) -> RenderableType:
    table = grid("step", "settings", "said", ">time")
    for number, step in enumerate(facts["steps"], 1):
        table.add_row(
            f"{number} {step['step']}",
            settings(unusual(step)),
            "; ".join(note["text"] for note in step["notes"]),
            seconds(step["seconds"]) if "seconds" in step else "",
        )
    return table
