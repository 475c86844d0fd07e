"""Show: how a file's bytes are used: each site's form and bytes against the order-0 entropy, and the ledger.

distance = stored / order 0 - 1             of the site's leaves; below 0 if a coder used neighbors
share = bytes of the site / of the file     the rest is text (names, trees, ledger), header and attachments
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.core.state import State
from tersor.errors import SiteError
from tersor.maths.uniform_grid import code_limits
from tersor.measure.bits import Bits
from tersor.measure.leaf_costs import LeafCost, leaf_costs_of
from tersor.model.sites import near
from tersor.report.console import percent, seconds, settings, whole
from tersor.report.facts import facts_of, unusual
from tersor.report.largest import Rows, largest, summed
from tersor.report.table import bit_rows, grid

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]
Leaves = tuple[LeafCost, ...]
REST = {
    "text": "names, trees, recipe, ledger",
    "header": "of safetensors: names, places",
    "grids": "of edges of the graph",
    "attachments": "files that go with the weights",
}  # besides the payload
# A leaf inside of a form: Dense float32. Alone it is the form.
LEAF = re.compile(r"(?<=[( ])(?:Dense|Coded) \w+")
ATTACHMENT = "attachment:"  # prefix of an attachment's name in the name of its tensor


def shown(
    result: State, path: Path, site: str | None = None, *, leaves: Mapping[str, Leaves] | None = None
) -> dict[str, Any]:
    """The facts of a loaded file, for the sites that the glob `site` matches (default: all). `leaves`: the
    costs of each site's, if they are known: finding them decodes it.

    Adds to those of facts_of: `nbytes`, `order0` (bits), `share` and `leaves` of each site, `parts` of the
    file in bytes, and `sum` over the shown sites. SiteError if the glob matches nothing.
    """
    every = leaves or {name: tuple(leaf_costs_of(form)) for name, form in result.forms.items()}
    bits = {
        name: Bits(math.prod(form.shape), 8 * form.nbytes, sum(leaf.order0 for leaf in every[name]))
        for name, form in result.forms.items()
    }
    nbytes = path.stat().st_size
    facts: dict[str, Any] = {"file": {"name": path.name, "nbytes": nbytes}, **facts_of(result, bits)}
    if site is not None:
        chosen = {name: found for name, found in facts["sites"].items() if fnmatchcase(name, site)}
        if not chosen:
            raise SiteError(f"{path}: no site {site!r}; {near(site, list(result.sites.values()))}")
        facts["sites"] = chosen
    for name, found in facts["sites"].items():
        found["leaves"] = [asdict(leaf) for leaf in every[name]]
        found["nbytes"] = sum(leaf.nbytes for leaf in every[name])
        found["order0"] = bits[name].bound
        found["share"] = found["nbytes"] / max(nbytes, 1)
    facts["parts"] = parts(path, result)
    facts["sum"] = total_of(facts["sites"].values())
    return facts


def total_of(sites: Iterable[Facts]) -> dict[str, Any]:
    """Weights, bytes and entropy of several sites."""
    found = list(sites)
    return {key: sum(site[key] for site in found) for key in ("weights", "nbytes", "order0")}


def parts(path: Path, result: State) -> dict[str, int]:
    """Bytes of the file by purpose. A file with the short header has only text."""
    header, attached = header_of(path)
    grids = sum(edge.nbytes for edge in result.grids.values())
    text = path.stat().st_size - result.nbytes - header - attached
    rest = {"header": header, "grids": grids, "attachments": attached}
    found = {"payload": result.nbytes - grids, "text": text}
    return found | {key: nbytes for key, nbytes in rest.items() if nbytes}


def header_of(path: Path) -> tuple[int, int]:
    """Bytes of a safetensors header, and of the attachments in it. The file has been checked before."""
    with path.open("rb") as file:
        start = file.read(9)
        size = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or 8 + size > path.stat().st_size:
            return 0, 0
        entries = json.loads(start[8:] + file.read(size - 1))
    places = [entry["data_offsets"] for name, entry in entries.items() if name.startswith(ATTACHMENT)]
    return 8 + size, sum(end - begin for begin, end in places)


def distance(nbytes: int, order0: float) -> float | None:
    """Bytes above the order-0 entropy, as a fraction of it. None if the entropy is 0."""
    return 8 * nbytes / order0 - 1 if order0 > 0 else None


def signed(share: float | None) -> str:
    """+0.31 %, or "-" if there is nothing to compare with."""
    return "-" if share is None else f"{100 * share:+.2f} %"


def tables(facts: Facts, every: bool = False) -> Iterator[RenderableType]:
    """The facts for a terminal; `every`: with a row for every site."""
    file = facts["file"]
    yield f"{file['name']}: {whole(file['nbytes'])} bytes, {whole(facts['bits']['weights'])} weights"
    for label, before, after, _ in bit_rows(facts):
        yield f"{label}: {before} as given, {after} stored"
    rows = largest(facts["sites"], every)
    yield sites(facts, rows, every)
    if rows.more or rows.buffers:
        yield "--all shows every row"
    yield from besides(facts)
    if facts["steps"] or "past" in facts:
        yield ledger(facts)
    if "html" in facts:
        yield f"written to {facts['html']['name']}, {whole(facts['html']['nbytes'])} bytes"
    yield f"base {facts['base']}, result {facts['result']}, ledger {facts['ledger']}"


def sites(facts: Facts, rows: Rows, every: bool) -> RenderableType:
    table = grid("site", "shape", "form", ">bytes", ">bits", ">order 0", ">distance", ">share")
    for name in rows.shown:
        site = facts["sites"][name]
        of = f" of {shape(site['given'])}" if "given" in site else ""
        form = site["form"] if every else shorter(site["form"])
        table.add_row(name, f"{shape(site['shape'])}{of}", form, *costs(site, facts))
    for names, what in ((rows.more, "more sites"), (rows.buffers, "buffers")):
        if names:
            total = total_of(facts["sites"][name] for name in names)
            table.add_row(f"{whole(len(names))} {what}", "", "", *costs(total, facts))
    table.add_section()
    table.add_row("all of these", "", "", *costs(facts["sum"], facts))
    for word, text in REST.items():
        if word in facts["parts"]:
            nbytes = facts["parts"][word]
            table.add_row(word, "", text, whole(nbytes), "", "", "", percent(share(nbytes, facts), 1))
    return table


def shorter(form: str) -> str:
    """A form without its leaves, for a row of one line: Masked(Affine(4 bits))."""
    inner = LEAF.sub("", form)  # leaves the commas beside them
    return re.sub(r"(, )+(?=[)])|(?<=[(])(, )+", "", inner).replace("()", "")


def shape(lengths: Iterable[int]) -> str:
    return " x ".join(map(str, lengths)) or "scalar"


def besides(facts: Facts) -> Iterator[RenderableType]:
    """The other content of the file: grids of edges, changed modules, attached files."""
    if "grids" in facts:
        table = grid("edge", ">bits", ">grids", "from", ">bytes", "")
        for edge, found in facts["grids"].items():
            low, _ = code_limits(found["bits"], found["signed"])
            word = "stale" if found["stale"] else "dynamic" if found["dynamic"] else ""
            table.add_row(
                edge, str(found["bits"]), whole(found["scales"]), str(low), whole(found["nbytes"]), word
            )
        yield table
    if "changes" in facts:
        table = grid("module", "became")
        for change in facts["changes"]:
            table.add_row(
                change["module"] or "the model", f"{change['text']} {settings(change.get('settings', {}))}"
            )
        yield table
    if "attachments" in facts:
        table = grid("attached", ">bytes")
        for name, found in facts["attachments"].items():
            table.add_row(name, whole(found["nbytes"]))
        yield table


def costs(found: Facts, facts: Facts) -> tuple[str, ...]:
    """Bytes, bits a weight, their order-0 entropy, the distance between them, and the share of the file."""
    count, nbytes, order0 = max(found["weights"], 1), found["nbytes"], found["order0"]
    return (
        whole(nbytes), f"{8 * nbytes / count:.3f}", f"{order0 / count:.3f}",
        signed(distance(nbytes, order0)), percent(share(nbytes, facts), 1),
    )  # fmt: skip


def share(nbytes: int, facts: Facts) -> float:
    return nbytes / max(facts["file"]["nbytes"], 1)


def ledger(facts: Facts) -> RenderableType:
    table = grid("step", "settings", "notes", ">time")
    past = facts.get("past", ())
    for number, name in enumerate(past, 1):
        table.add_row(f"{number} {name}", "", "only its name is kept", "")
    for number, step in enumerate(facts["steps"], 1 + len(past)):
        table.add_row(
            f"{number} {step['step']}",
            settings(unusual(step)),
            "; ".join(summed(note["text"] for note in step["notes"])),
            seconds(step["seconds"]) if "seconds" in step else "",
        )
    return table
