"""Facts: what a run did and its measurements, as one JSON document. Tables and report.json show it.

A number that was not measured is absent, never zero. The report's accuracy and latency are those measured
after the last edit: earlier measurements of a recipe are shown with their step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tersor.core.state import State
from tersor.forms import Affine, Coded, Dense, Form, Grid, LogGrid
from tersor.measure.bits import Bits, bits_of
from tersor.model.changes import Set
from tersor.model.sites import Site
from tersor.record.ledger import Entry, Ledger
from tersor.steps import STEPS

MEASURED = ("accuracy", "latency")  # kinds of notes about the whole model at the top of the report


def facts_of(result: State, bits: Mapping[str, Bits] | None = None) -> dict[str, Any]:
    """The facts in a result and its ledger. pipeline.py adds files and later measurements. `bits`: of each
    site, if they are known: finding them decodes it."""
    ledger = result.ledger
    sites = {
        name: site_facts(site, result.forms[name], bits[name] if bits else bits_of(result.forms[name]))
        for name, site in result.sites.items()
        if name in result.forms
    }
    facts: dict[str, Any] = {
        "base": ledger.base,
        "result": result.digest,
        "ledger": ledger.digest,
        "recipe": ledger.recipe,
        "bits": total_bits(sites, result.sites),
        "steps": step_facts(ledger),
        "sites": sites,
    }
    facts |= {key: value for key, value in besides(result).items() if value}
    for word in MEASURED:
        if (entry := latest(ledger, word)) is not None:
            facts[word] = dict(entry.data)
    return facts


def besides(result: State) -> dict[str, Any]:
    """The rest of a state besides forms: changes of modules, grids of edges, attachments, and steps whose
    names alone are known."""
    return {
        "past": [name for name, _ in result.ledger.past],
        "changes": [
            {"module": change.module, "text": f"{change.attribute} = {change.value}"}
            if isinstance(change, Set)
            else {
                "module": change.module,
                "text": f"replaced: {change.stock}",
                "settings": dict(change.settings),
            }
            for change in result.changes
        ],
        "grids": {edge: grid_facts(grid) for edge, grid in result.grids.items()},
        "attachments": {name: {"nbytes": len(data)} for name, data in result.attachments.items()},
    }


def grid_facts(grid: Grid) -> dict[str, Any]:
    """One edge: the bits, number and kind of its grids."""
    return {
        "bits": grid.bits, "signed": grid.signed, "scales": grid.scale.shape[0] if grid.scale else 0,
        "symmetric": grid.zero is None and grid.scale is not None, "dynamic": grid.scale is None,
        "stale": grid.stale, "nbytes": grid.nbytes,
    }  # fmt: skip


def site_facts(site: Site, form: Form, bits: Bits) -> dict[str, Any]:
    """One site: its form and bits; `given` is its shape before it was cut."""
    facts = {
        "shape": list(form.shape), "dtype": site.dtype, "kind": site.kind, "form": outline(form),
        "weights": bits.weights, "stored": bits.stored, "bound": bits.bound,
    }  # fmt: skip
    facts |= {"given": list(site.shape)} if tuple(form.shape) != site.shape else {}
    return facts | ({"origin": site.origin} if site.origin else {})


def outline(form: Form) -> str:
    """The form in a few words: Masked(Coded bool, Codebook(Coded uint8, Dense float32))."""
    name = type(form).__name__
    if isinstance(form, Dense):
        return f"{name} {str(form.array.dtype).removeprefix('torch.')}"
    if isinstance(form, Coded):
        return f"{name} {form.dtype}"
    bits = f"{form.bits} bits, " if isinstance(form, (Affine, LogGrid)) else ""
    return f"{name}({bits}{', '.join(map(outline, form.children().values()))})"


def total_bits(sites: Mapping[str, Mapping[str, Any]], given: Mapping[str, Site]) -> dict[str, Any]:
    """Sums over everything stored, buffers too; `given`: bits of the same weights in their dtypes."""
    return {
        "weights": sum(site["weights"] for site in sites.values()),
        "given": sum(8 * given[name].torch_dtype.itemsize * site["weights"] for name, site in sites.items()),
        "stored": sum(site["stored"] for site in sites.values()),
        "bound": sum(site["bound"] for site in sites.values()),
    }


def latest(ledger: Ledger, kind: str) -> Entry | None:
    """The last note of this kind about the whole model, if no edit follows it."""
    for entry in reversed(ledger.entries):
        if entry.changes:
            return None
        if entry.kind == kind and not entry.site:
            return entry
    return None


def step_facts(ledger: Ledger) -> list[dict[str, Any]]:
    """Each step: its settings, its time, its notes on the whole model, what it did to each site."""
    found = []
    for number, step in enumerate(ledger.recipe.get("steps", []), len(ledger.past)):
        ((name, settings),) = step.items()
        entries = [entry for entry in ledger.entries if entry.step == number]
        facts: dict[str, Any] = {"step": name, "settings": settings}
        if number in ledger.seconds:
            facts["seconds"] = ledger.seconds[number]
        facts["notes"] = [
            {"kind": entry.kind, "text": entry.text, **({"data": dict(entry.data)} if entry.data else {})}
            for entry in entries
            if not entry.changes and not entry.site
        ]
        facts["sites"] = site_events(entries)
        found.append(facts)
    return found


def site_events(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    """What one step did to each site: `did` in one word, `how` for edits, and the text of its notes."""
    sites: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.site:
            facts = sites.setdefault(entry.site, {})
            if entry.changes:
                facts |= {"how": entry.how} | ({"after": entry.after} if entry.after else {})
            elif entry.kind == "masked":  # the executor's note, which precedes those of the step
                facts["masked"] = entry.text
            else:
                facts |= {"did": entry.kind, "text": entry.text}
                facts |= {"data": dict(entry.data)} if entry.data else {}
    for facts in sites.values():
        facts.setdefault("did", "done")
    return sites


def unusual(step: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a step's facts that are not at their default; all of them if the step is unknown."""
    usual = {} if step["step"] not in STEPS else {f.name: f.default for f in fields(STEPS[step["step"]])}
    return {key: value for key, value in step["settings"].items() if value != usual.get(key, ...)}
