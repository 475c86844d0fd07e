"""Document: sites, aliases, changes and ledger as the file's JSON, and back. docs/format.md sections 4 and 8.

What follows from the rest is left out: a layer's name from the site's, an edit's digests from the edit before
it and from the form that is stored.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tersor.errors import FormatError
from tersor.io.header import NAMED, check_shape, natural
from tersor.io.text import dump
from tersor.model.changes import Replace, Set
from tersor.model.sites import Site
from tersor.record.ledger import Entry, Ledger
from tersor.record.relation import HOW

MODULES = ("set", "replace")  # what happens to a module
DEFAULTS = {"dtype": "float32", "kind": "other", "axis": 0, "groups": 1}
KEYS = ("sites", "aliases", "indices", "changes", "grids", "attachments", "base", "past", "recipe", "ledger")
TINY = KEYS[:5]  # of a file with the short header, whose sites have no digests
ROOM, ROOM_A_SITE = 4000, 100  # bytes of a ledger's JSON: in all, and for each site and step
CLIPPED = 400  # characters of a note's text
Json = dict[str, Any]


def site_to_json(site: Site, digest: str | None, tree: Any, kept: Mapping[int, int]) -> Json:
    """`kept`: for each axis that was cut the number of the list of indices that are present."""
    told: Json = {
        key: getattr(site, key) for key, default in DEFAULTS.items() if getattr(site, key) != default
    }
    told |= {} if site.layer == site.name.rpartition(".")[0] else {"layer": site.layer}
    told |= {"kept": {str(axis): number for axis, number in sorted(kept.items())}} if kept else {}
    told |= {"origin": site.origin} if site.origin else {}
    told |= {"digest": digest} if digest else {}
    return {"shape": list(site.shape), **told, "form": tree}


def site_from_json(
    name: str, told: Any, indices: Sequence[tuple[int, ...]] = (), *, tiny: bool = False
) -> tuple[Site, str, Any, dict[int, tuple[int, ...]]]:
    """(site, digest, tree, indices that are present by axis). The sites of a tiny file have no digest; theirs
    is ""."""
    who = f"{name[:200]}: "
    told = of_type(told, dict, f"{who}a site")
    allowed = ("shape", *DEFAULTS, "layer", "kept", "origin", *(() if tiny else ("digest",)), "form")
    only(told, allowed, f"{who}a site")
    facts = DEFAULTS | {"layer": name.rpartition(".")[0], "origin": ""} | told
    for key in ("dtype", "kind", "layer", "origin"):
        of_type(facts[key], str, f"{who}{key}")
    for key in ("axis", "groups"):
        of_type(facts[key], int, f"{who}{key}")
    shape = check_shape(facts.get("shape"), f"{who}shape")
    if facts["dtype"] not in NAMED:
        raise FormatError(f"{who}dtype {facts['dtype'][:40]!r} is not known; known are {', '.join(NAMED)}")
    if not 0 <= facts["axis"] < max(len(shape), 1) or facts["groups"] < 1:
        raise FormatError(f"{who}axis {facts['axis']} or groups {facts['groups']} do not fit {list(shape)}")
    words = (facts[key] for key in ("dtype", "kind", "axis", "groups", "layer", "origin"))
    signed = "" if tiny else digest(facts.get("digest"), f"{who}digest")
    kept = kept_from_json(facts.get("kept", {}), shape, indices, who)
    return Site(name, shape, *words), signed, facts.get("form"), kept


def shape_of(site: Site, kept: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a site as it is stored, after its cuts."""
    return tuple(len(kept[axis]) if axis in kept else count for axis, count in enumerate(site.shape))


def kept_from_json(
    told: Any, shape: tuple[int, ...], indices: Sequence[tuple[int, ...]], who: str
) -> dict[int, tuple[int, ...]]:
    """The given index of each index that is present, by axis."""
    kept = {}
    for word, number in of_type(told, dict, f"{who}kept").items():
        axis = natural(word)
        if axis is None or axis >= len(shape) or not 0 <= of_type(number, int, f"{who}kept") < len(indices):
            raise FormatError(f"{who}kept has axis {word[:20]!r} with the list {number}: there is none")
        found = indices[number]
        if not found or max(found) >= shape[axis] or len(set(found)) < len(found):
            raise FormatError(f"{who}kept: the list {number} is empty, too far or has an index twice")
        kept[axis] = found
    return kept


def runs_of(indices: Sequence[int]) -> list[int]:
    """Indices as [first, count, first, count, ...] of runs that go up by one."""
    runs: list[int] = []
    for index in indices:
        if runs and index == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [index, 1]
    return runs


def indices_from_json(told: Any, room: int) -> list[tuple[int, ...]]:
    """Lists of indices from their runs; all together no more than `room` indices."""
    found = []
    for runs in of_type(told, list, "indices"):
        fine = isinstance(runs, list) and len(runs) % 2 == 0 and all(type(n) is int and n >= 0 for n in runs)
        room -= sum(runs[1::2]) if fine else 0
        if not fine or room < 0:
            raise FormatError(f"indices: runs are [first, count, ...] of few indices, not {str(runs)[:60]}")
        pairs = zip(runs[::2], runs[1::2], strict=True)
        found.append(tuple(index for first, count in pairs for index in range(first, first + count)))
    return found


def changes_to_json(changes: Iterable[Set | Replace]) -> list[list[Any]]:
    return [
        ["set", change.module, change.attribute, change.value]
        if isinstance(change, Set)
        else ["replace", change.module, change.stock, dict(change.settings)]
        for change in changes
    ]


def changes_from_json(told: Any) -> tuple[Set | Replace, ...]:
    kinds = {"set": (Set, int), "replace": (Replace, dict)}
    found = []
    for item in of_type(told, list, "changes"):
        word, *rest = of_type(item, list, "changes: an item") or [None]
        if not isinstance(word, str) or word not in kinds or len(rest) != 3:
            raise FormatError(f"changes: an item is a set or a replace, not {str(item)[:60]}")
        kind, last = kinds[word]
        values = (
            of_type(value, type_, f"changes: {word}")
            for value, type_ in zip(rest, (str, str, last), strict=True)
        )
        found.append(kind(*values))
    return tuple(found)


def aliases_from_json(told: Any, sites: Mapping[str, Site]) -> dict[str, str]:
    for alias, name in of_type(told, dict, "aliases").items():
        if not isinstance(name, str) or name not in sites or alias in sites:
            raise FormatError(f"aliases: {alias[:100]!r} cannot stand for {str(name)[:100]!r}")
    return told


def history_to_json(ledger: Ledger, digests: Mapping[str, str], sites: int) -> Json:
    """Past steps, recipe and ledger, in at most 4,000 bytes and 100 for each site and step: the oldest steps
    become a line with the digest that the ledger had after them, as few as need be."""
    room = ROOM + ROOM_A_SITE * sites * ledger.count
    for count in range(len(ledger.past), ledger.count + 1):
        brief = ledger.brief(count)
        entries = ledger_to_json(brief, digests)
        told = {"past": [list(line) for line in brief.past], "recipe": brief.recipe, "ledger": entries}
        told = {key: value for key, value in told.items() if value}
        if len(dump(told)) <= room or count == ledger.count:
            return told
    return {}


def ledger_to_json(ledger: Ledger, digests: Mapping[str, str]) -> list[Json]:
    """Entries grouped by step. `digests`: of each site's form, as it is stored."""
    parts: list[Json] = []
    names, following = ledger.step_names(), len(ledger.past)
    last: dict[str, str] = {}
    for (step, name), entries in itertools.groupby(ledger.entries, lambda e: (e.step, e.name)):
        part: Json = {} if step == following else {"step": step}
        part |= {} if names[step : step + 1] == [name] else {"name": name}
        part["events"] = [event_to_json(entry, last, digests) for entry in entries]
        parts.append(part)
        following = step + 1
    return parts


def event_to_json(entry: Entry, last: dict[str, str], digests: Mapping[str, str]) -> Json:
    told: Json = {"site": entry.site} if entry.site or entry.changes else {}
    data = {"data": dict(entry.data)} if entry.data else {}
    if not entry.changes:
        return told | {"kind": entry.kind, "text": clipped(entry.text)} | data
    told |= {"how": entry.how} | data
    if entry.how in MODULES:
        return told
    told |= {} if last.get(entry.site, "") == entry.before else {"before": entry.before}
    told |= {} if digests.get(entry.site) == entry.after else {"after": entry.after}
    last[entry.site] = entry.after
    return told


def clipped(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED - 3]}..."


def ledger_from_json(document: Json, digests: Mapping[str, str]) -> Ledger:
    """The ledger, without forms."""
    recipe = of_type(document.get("recipe", {}), dict, "recipe")
    steps = of_type(recipe.get("steps", []), list, "recipe: steps")
    if not all(isinstance(step, dict) and len(step) == 1 for step in steps):
        raise FormatError("recipe: a step is an object with one key, its name")
    seed = recipe.get("seed", 0)
    if not natural_numbers(seed, len(steps)):
        raise FormatError(f"recipe: seed is a whole number or one for each step, not {str(seed)[:60]}")
    base = digest(document["base"], "base") if "base" in document else ""
    past = tuple(past_from_json(line) for line in of_type(document.get("past", []), list, "past"))
    ledger, step = Ledger(base, recipe, past=past), len(past) - 1
    last: dict[str, str] = {}
    names = ledger.step_names()
    for part in of_type(document.get("ledger", []), list, "ledger"):
        only(of_type(part, dict, "ledger: a part"), ("step", "name", "events"), "ledger: a part")
        step = of_type(part.get("step", step + 1), int, "ledger: step")
        if step < len(past):
            raise FormatError(f"ledger: step {step}, but its steps count from {len(past)}")
        name = part.get("name", names[step] if step < len(names) else None)
        for event in of_type(part.get("events"), list, "ledger: events"):
            fields = event_from_json(of_type(event, dict, "ledger: an event"), last, digests)
            ledger.entries.append(Entry(step, of_type(name, str, "ledger: name"), **fields))
    return ledger


def past_from_json(line: Any) -> tuple[str, str]:
    if not isinstance(line, list) or len(line) != 2 or not isinstance(line[0], str):
        raise FormatError(f"past: a line is a step's name and a digest, not {str(line)[:60]}")
    return line[0], digest(line[1], "past: a digest")


def natural_numbers(seed: Any, count: int) -> bool:
    seeds = seed if isinstance(seed, list) else [seed] * count
    return len(seeds) == count and all(type(one) is int and one >= 0 for one in seeds)


def event_from_json(event: Json, last: dict[str, str], digests: Mapping[str, str]) -> Json:
    """The fields of an entry."""
    who = "ledger: an event's "
    if "how" not in event:
        only(event, ("site", "kind", "text", "data"), "ledger: a note")
        fields = {"site": "", "data": {}} | event
        for key, kind in (("site", str), ("kind", str), ("text", str), ("data", dict)):
            of_type(fields.get(key), kind, who + key)
        return fields
    site = of_type(event.get("site"), str, f"{who}site")
    data = of_type(event.get("data", {}), dict, f"{who}data")
    if event["how"] not in (*HOW, "cut", *MODULES):
        allowed = ", ".join((*HOW, "cut", *MODULES))
        raise FormatError(f"{who}how is {str(event['how'])[:40]!r}, but it is one of {allowed}")
    if event["how"] in MODULES:
        only(event, ("site", "how", "data"), "ledger: a change of a module")
        return {"site": site, "how": event["how"], "data": data}
    only(event, ("site", "how", "before", "after", "data"), "ledger: an edit")
    first = "" if "/" in site else None  # an edge of the graph had no grid before its first
    before = event.get("before", last.get(site, first))
    before = before if before == "" and first == "" else digest(before, f"{who}before")
    last[site] = digest(event.get("after", digests.get(site)), f"{who}after")
    return {"site": site, "how": event["how"], "before": before, "after": last[site], "data": data}


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
