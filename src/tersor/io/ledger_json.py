"""Ledger JSON: the ledger as JSON in a file, and back. docs/format.md section 8.

[17, "wrap", before, after]     an edit of the 18th site
[17, "", "done", "kept 72 of 144 weights", {"kept": 72}]     a note
Site names become numbers. Digests that follow from others are left out. An edit and its note take 90 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tersor.errors import FormatError
from tersor.io.json_text import Json, digest, dump, of_type, only
from tersor.record.ledger import Entry, Ledger
from tersor.record.relation import HOW

ROOM, ROOM_A_SITE = 4000, 100  # bytes of a ledger's JSON: fixed, and per site and step
CLIPPED = 400  # characters of a note's text
# Keys of an event's data, in order, for each `how`. Digests follow them.
DATA: dict[str, dict[str, type]] = {
    **{how: {} for how in HOW},
    "cut": {"axis": int, "count": int, "kept": str},
    "set": {"attribute": str, "value": int},
    "replace": {"stock": str, "settings": dict},
}
MODULES = ("set", "replace")  # changes of a module have no digests


def history_to_json(ledger: Ledger, digests: Mapping[str, str], sites: int) -> Json:
    """Past steps, recipe and ledger, in at most 4,000 bytes plus 100 per site and step. The oldest steps, as
    few as necessary, become a line with the ledger's digest after them.

    `digests`: those of the stored forms and grids, by site and edge, in the order of the text.
    """
    room = ROOM + ROOM_A_SITE * sites * ledger.count
    for count in range(len(ledger.past), ledger.count + 1):
        brief = ledger.brief(count)
        history = {
            "past": [list(line) for line in brief.past], "recipe": brief.recipe,
            "ledger": ledger_to_json(brief, digests),
        }  # fmt: skip
        history = {key: value for key, value in history.items() if value}
        if len(dump(history)) <= room or count == ledger.count:
            return history
    return {}


def ledger_to_json(ledger: Ledger, digests: Mapping[str, str]) -> list[Json]:
    """The entries, grouped by step."""
    parts: list[Json] = []
    names, following = ledger.step_names(), len(ledger.past)
    numbers = {name: number for number, name in enumerate(digests)}
    last: dict[str, str] = {}
    for (step, name), entries in itertools.groupby(ledger.entries, lambda e: (e.step, e.name)):
        part: Json = {} if step == following else {"step": step}
        part |= {} if names[step : step + 1] == [name] else {"name": name}
        part["events"] = [
            [numbers.get(entry.site, entry.site), entry.how, *event_to_json(entry, last, digests)]
            for entry in entries
        ]
        parts.append(part)
        following = step + 1
    return parts


def event_to_json(entry: Entry, last: dict[str, str], digests: Mapping[str, str]) -> list[Any]:
    if not entry.changes:
        return [entry.kind, clipped(entry.text), *([dict(entry.data)] if entry.data else [])]
    data = [entry.data[key] for key in DATA[entry.how]]
    if entry.how in MODULES:
        return data
    before = None if last.get(entry.site) == entry.before else entry.before
    after = None if digests.get(entry.site) == entry.after else entry.after
    last[entry.site] = entry.after
    if after is not None:
        return [*data, before, after]
    return data if before is None else [*data, before]


def clipped(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED - 3]}..."


def ledger_from_json(document: Json, digests: Mapping[str, str]) -> Ledger:
    """The ledger from the text. `digests`: those of stored forms and grids, in the order of the text."""
    recipe = of_type(document.get("recipe", {}), dict, "recipe")
    steps = of_type(recipe.get("steps", []), list, "recipe: steps")
    if not all(isinstance(step, dict) and len(step) == 1 for step in steps):
        raise FormatError("recipe: a step is an object with one key, its name")
    if not all(isinstance(settings, dict) for step in steps for settings in step.values()):
        raise FormatError("recipe: the settings of a step are an object")
    seed = recipe.get("seed", 0)
    if not natural_numbers(seed, len(steps)):
        raise FormatError(f"recipe: seed is a whole number or one for each step, not {str(seed)[:60]}")
    zeros = recipe.get("zeros", "*")
    globs = zeros if isinstance(zeros, list) else [zeros] * len(steps)
    if len(globs) != len(steps) or not all(isinstance(glob, str) for glob in globs):
        raise FormatError(f"recipe: zeros is a string or one for each step, not {str(zeros)[:60]}")
    base = digest(document["base"], "base") if "base" in document else ""
    past = tuple(past_from_json(line) for line in of_type(document.get("past", []), list, "past"))
    ledger, step = Ledger(base, recipe, past=past), len(past) - 1
    last: dict[str, str] = {}
    names, known = ledger.step_names(), list(digests)
    for part in of_type(document.get("ledger", []), list, "ledger"):
        only(of_type(part, dict, "ledger: a part"), ("step", "name", "events"), "ledger: a part")
        step = of_type(part.get("step", step + 1), int, "ledger: step")
        if step < len(past):
            raise FormatError(f"ledger: step {step}, but its steps count from {len(past)}")
        name = part.get("name", names[step] if step < len(names) else None)
        for event in of_type(part.get("events"), list, "ledger: events"):
            site, how, *values = with_name(event, known)
            fields = (
                note_from_json(values) if how == "" else entry_from_json(site, how, values, last, digests)
            )
            ledger.entries.append(Entry(step, of_type(name, str, "ledger: name"), site, how, **fields))
    return ledger


def past_from_json(line: Any) -> tuple[str, str]:
    if not isinstance(line, list) or len(line) != 2 or not isinstance(line[0], str):
        raise FormatError(f"past: a line is a step's name and a digest, not {str(line)[:60]}")
    return line[0], digest(line[1], "past: a digest")


def natural_numbers(seed: Any, count: int) -> bool:
    """Whether a recipe's seed is one whole number, or a list of one per step."""
    if isinstance(seed, list):
        return len(seed) == count and all(type(n) is int and n >= 0 for n in seed)
    return type(seed) is int and seed >= 0


def with_name(event: Any, known: list[str]) -> list[Any]:
    """The event with the name of its site instead of a number."""
    site, how, *_ = event if isinstance(event, list) and len(event) > 1 else [None, None]
    if type(site) is int and 0 <= site < len(known):
        event = [known[site], *event[1:]]
    elif type(site) is not str:
        raise FormatError(f"ledger: an event is [site, how, ...], not {str(event)[:60]}")
    if not isinstance(how, str) or how not in ("", *DATA):
        raise FormatError(f"ledger: how is {str(how)[:40]!r}, but it is one of {', '.join(DATA)}, or empty")
    return event


def note_from_json(values: list[Any]) -> Json:
    """The fields of a note's entry."""
    kinds = {"kind": str, "text": str, "data": dict}
    if not 2 <= len(values) <= 3:
        raise FormatError(f"ledger: a note is [site, '', kind, text, data], not {len(values) + 2} values")
    return {
        key: of_type(value, kinds[key], f"ledger: a note's {key}")
        for key, value in zip(kinds, values, strict=False)
    }


def entry_from_json(
    site: str, how: str, values: list[Any], last: dict[str, str], digests: Mapping[str, str]
) -> Json:
    """The fields of the entry of an edit, a cut or a change of a module."""
    who, keys = f"ledger: a {how}'s ", DATA[how]
    if not len(keys) <= len(values) <= len(keys) + (0 if how in MODULES else 2):
        raise FormatError(f"ledger: a {how} has {', '.join(keys) or 'two digests'}, not {str(values)[:60]}")
    data = {key: of_type(value, keys[key], who + key) for key, value in zip(keys, values, strict=False)}
    if how in MODULES:
        return {"data": data}
    before, after = [*values[len(keys) :], None, None][:2]
    before = last.get(site) if before is None else before
    # An edge's first grid has no digest before it.
    before = "" if before == "" else digest(before, f"{who}before")
    last[site] = digest(digests.get(site) if after is None else after, f"{who}after")
    return {"data": data, "before": before, "after": last[site]}
