"""Records: section 8 of docs/format.md, the ledger. Does not use Tersor or PyTorch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from formulas import check
from words import is_digest, natural

EDITS = ("wrap", "refine", "lossless", "absorb")
FIELDS = {"cut": {"axis": int, "count": int, "kept": str}, "set": {"attribute": str, "value": int},
          "replace": {"stock": str, "settings": dict}}  # fmt: skip
NOTE = {"kind": str, "text": str, "data": dict}


def ledger_of(document: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(all events, with step, name and digests filled in; the digest of the ledger)."""
    past, recipe, parts = (document.get(key, kind()) for key, kind in
                           (("past", list), ("recipe", dict), ("ledger", list)))  # fmt: skip
    check("base" not in document or is_digest(document["base"]), "bad base")
    fine = isinstance(past, list) and all(isinstance(line, list) and len(line) == 2 for line in past)
    check(fine and all(isinstance(a, str) and is_digest(b) for a, b in past), "past: not [name, digest]")
    check(isinstance(recipe, dict) and isinstance(recipe.get("steps", []), list), "bad recipe")
    steps, seed = recipe.get("steps", []), recipe.get("seed", 0)
    check(all(isinstance(step, dict) and len(step) == 1 for step in steps), "bad steps")
    check(all(isinstance(value, dict) for step in steps for value in step.values()), "bad settings")
    check(
        natural(seed) or (isinstance(seed, list) and len(seed) == len(steps)),
        "neither one seed nor one a step",
    )
    seeds = seed if isinstance(seed, list) else [seed] * len(steps)
    check(all(map(natural, seeds)), "seeds must be integers of 0 or more")
    names = [*(name for name, _ in past), *(next(iter(step)) for step in steps)]
    held = {**document["sites"], **document.get("grids", {})}
    events = list(events_of(parts, len(past), names, held))
    digest = past[-1][1] if past else document.get("base", "")
    for number, (step, step_seed) in enumerate(zip(steps, seeds, strict=True), len(past)):
        lines = [line_of(event) for event in events if event["step"] == number]
        text = json.dumps([digest, step_seed, step, lines], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return events, digest


def line_of(event: dict[str, Any]) -> list[Any]:
    data = event["data"] if event["how"] else {}
    return [*(event[key] for key in ("name", "about", "how", "before", "after", "kind")), data]


def events_of(parts: Any, first: int, names: list[str], held: dict[str, Any]) -> Any:
    check(isinstance(parts, list) and all(isinstance(part, dict) for part in parts), "bad ledger")
    step, last = first - 1, {}
    for part in parts:
        check(set(part) <= {"step", "name", "events"}, "ledger: unknown keys")
        step = part.get("step", step + 1)
        check(natural(step) and step >= first, "ledger: step")
        name = part.get("name", names[step] if step < len(names) else None)
        check(isinstance(part.get("events"), list), "ledger: events")
        for event in part["events"]:
            check(isinstance(name, str), "ledger: name")
            yield {"step": step, "name": name} | event_of(event, held, last)


def event_of(event: Any, held: dict[str, Any], last: dict[str, str]) -> dict[str, Any]:
    check(isinstance(event, list) and len(event) >= 2, "ledger: an event must be a list")
    about, how, *rest = event
    if type(about) is int:
        check(0 <= about < len(held), "ledger: no such site or edge")
        about = list(held)[about]
    check(isinstance(about, str) and isinstance(how, str), "ledger: about and how")
    found = {"about": about, "how": how, "before": "", "after": "", "kind": "", "text": "", "data": {}}
    if how == "":
        check(2 <= len(rest) <= 3 and all(map(isinstance, rest, NOTE.values())), "ledger: a note")
        return found | dict(zip(NOTE, rest, strict=False))
    check(how in EDITS or how in FIELDS, "ledger: how")
    keys = FIELDS.get(how, {})
    digests = rest[len(keys) :]
    check(
        len(rest) >= len(keys) and len(digests) <= (0 if how in ("set", "replace") else 2), "ledger: an event"
    )
    check(all(type(a) is b for a, b in zip(rest, keys.values(), strict=False)), "ledger: data of an event")
    found["data"] = dict(zip(keys, rest, strict=False))
    if how not in ("set", "replace"):
        before, after = [*digests, None, None][:2]
        before = last.get(about) if before is None else before
        after = held.get(about, {}).get("digest") if after is None else after
        check(is_digest(before) or before == "", "ledger: before")
        check(is_digest(after), "ledger: after")
        last[about] = after
        found |= {"before": before, "after": after}
    return found
