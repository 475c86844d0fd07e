"""Document: sites, aliases and ledger as the file's JSON, and back. docs/format.md sections 4 and 8.

What follows from the rest is left out: a layer's name from the site's, an edit's digests from the edit before
it and from the form that is stored.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from tersor.core.ledger import Entry, Ledger
from tersor.core.step import HOW
from tersor.errors import FormatError
from tersor.io.header import NAMED, check_shape
from tersor.model.sites import Site

DEFAULTS = {"dtype": "float32", "kind": "other", "axis": 0, "groups": 1}
KEYS = ("sites", "aliases", "base", "recipe", "ledger")
TINY = KEYS[:2]  # of a file with the short header, whose sites have no digests
Json = dict[str, Any]


def site_to_json(site: Site, digest: str | None, tree: Any) -> Json:
    told = {key: getattr(site, key) for key, default in DEFAULTS.items() if getattr(site, key) != default}
    told |= {} if site.layer == site.name.rpartition(".")[0] else {"layer": site.layer}
    told |= {"digest": digest} if digest else {}
    return {"shape": list(site.shape), **told, "form": tree}


def site_from_json(name: str, told: Any, *, tiny: bool = False) -> tuple[Site, str, Any]:
    """(site, digest, tree). The sites of a tiny file have no digest; theirs is ""."""
    who = f"{name[:200]}: "
    told = of_type(told, dict, f"{who}a site")
    only(told, ("shape", *DEFAULTS, "layer", *(() if tiny else ("digest",)), "form"), f"{who}a site")
    facts = DEFAULTS | {"layer": name.rpartition(".")[0]} | told
    for key, kind in (("dtype", str), ("kind", str), ("layer", str), ("axis", int), ("groups", int)):
        of_type(facts[key], kind, f"{who}{key}")
    shape = check_shape(facts.get("shape"), f"{who}shape")
    if facts["dtype"] not in NAMED:
        raise FormatError(f"{who}dtype {facts['dtype'][:40]!r} is not known; known are {', '.join(NAMED)}")
    if not 0 <= facts["axis"] < max(len(shape), 1) or facts["groups"] < 1:
        raise FormatError(f"{who}axis {facts['axis']} or groups {facts['groups']} do not fit {list(shape)}")
    site = Site(name, shape, facts["dtype"], facts["kind"], facts["axis"], facts["groups"], facts["layer"])
    signed = "" if tiny else digest(facts.get("digest"), f"{who}digest")
    return site, signed, facts.get("form")


def aliases_from_json(told: Any, sites: Mapping[str, Site]) -> dict[str, str]:
    for alias, name in of_type(told, dict, "aliases").items():
        if not isinstance(name, str) or name not in sites or alias in sites:
            raise FormatError(f"aliases: {alias[:100]!r} cannot stand for {str(name)[:100]!r}")
    return told


def ledger_to_json(ledger: Ledger, digests: Mapping[str, str]) -> list[Json]:
    """Entries grouped by step. `digests`: of each site's form, as it is stored."""
    parts: list[Json] = []
    names, following = ledger.step_names(), 0
    last: dict[str, str] = {}
    for (step, name), entries in itertools.groupby(ledger.entries, lambda e: (e.step, e.name)):
        part: Json = {} if step == following else {"step": step}
        part |= {} if names[step : step + 1] == [name] else {"name": name}
        part["events"] = [event_to_json(entry, last, digests) for entry in entries]
        parts.append(part)
        following = step + 1
    return parts


def event_to_json(entry: Entry, last: dict[str, str], digests: Mapping[str, str]) -> Json:
    told: Json = {"site": entry.site} if entry.site or entry.is_edit else {}
    if not entry.is_edit:
        told |= {"kind": entry.kind, "text": entry.text}
        return told | ({"data": dict(entry.data)} if entry.data else {})
    told["how"] = entry.how
    told |= {} if last.get(entry.site) == entry.before else {"before": entry.before}
    told |= {} if digests.get(entry.site) == entry.after else {"after": entry.after}
    last[entry.site] = entry.after
    return told


def ledger_from_json(document: Json, digests: Mapping[str, str]) -> Ledger:
    """The ledger, without forms."""
    recipe = of_type(document.get("recipe", {}), dict, "recipe")
    steps = of_type(recipe.get("steps", []), list, "recipe: steps")
    if not all(isinstance(step, dict) and len(step) == 1 for step in steps):
        raise FormatError("recipe: a step is an object with one key, its name")
    base = digest(document["base"], "base") if "base" in document else ""
    ledger, step = Ledger(base, recipe), -1
    last: dict[str, str] = {}
    names = ledger.step_names()
    for part in of_type(document.get("ledger", []), list, "ledger"):
        only(of_type(part, dict, "ledger: a part"), ("step", "name", "events"), "ledger: a part")
        step = of_type(part.get("step", step + 1), int, "ledger: step")
        if step < 0:
            raise FormatError(f"ledger: step {step}, but steps count from 0")
        name = part.get("name", names[step] if step < len(names) else None)
        for event in of_type(part.get("events"), list, "ledger: events"):
            fields = event_from_json(of_type(event, dict, "ledger: an event"), last, digests)
            ledger.entries.append(Entry(step, of_type(name, str, "ledger: name"), **fields))
    return ledger


def event_from_json(event: Json, last: dict[str, str], digests: Mapping[str, str]) -> Json:
    """The fields of an entry."""
    who = "ledger: an event's "
    if "how" not in event:
        only(event, ("site", "kind", "text", "data"), "ledger: a note")
        fields = {"site": "", "data": {}} | event
        for key, kind in (("site", str), ("kind", str), ("text", str), ("data", dict)):
            of_type(fields.get(key), kind, who + key)
        return fields
    only(event, ("site", "how", "before", "after"), "ledger: an edit")
    site = of_type(event.get("site"), str, f"{who}site")
    if event["how"] not in HOW:
        raise FormatError(f"{who}how is {str(event['how'])[:40]!r}, but it is one of {', '.join(HOW)}")
    before = digest(event.get("before", last.get(site)), f"{who}before")
    last[site] = digest(event.get("after", digests.get(site)), f"{who}after")
    return {"site": site, "how": event["how"], "before": before, "after": last[site]}


def digest(value: Any, who: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise FormatError(f"{who} must be 16 hex digits, not {str(value)[:40]!r}")
    return value


def of_type(value: Any, kind: type, who: str) -> Any:
    """The value, if it is exactly of this type: no bool is an int."""
    if type(value) is not kind:
        words = {
            dict: "an object",
            list: "a list",
            str: "a text",
            int: "a whole number",
            bool: "true or false",
        }
        raise FormatError(f"{who} must be {words[kind]}, not {str(value)[:60]!r}")
    return value


def only(told: Json, allowed: tuple[str, ...], who: str) -> None:
    unknown = [key for key in told if key not in allowed]
    if unknown:
        raise FormatError(f"{who} has no key {unknown[0][:40]!r}; known are {', '.join(allowed)}")
