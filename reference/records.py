"""Section 8 of docs/format.md: the ledger. No part of Tersor or PyTorch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from formulas import check
from words import is_digest, natural

EDITS = ("wrap", "refine", "lossless", "absorb")
TELLS = {"cut": {"axis": int, "count": int, "kept": str}, "set": {"attribute": str, "value": int},
         "replace": {"stock": str, "settings": dict}}  # fmt: skip
NOTE = {"kind": str, "text": str, "data": dict}


def ledger_of(document: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(the events one by one, with step, name and digests filled in, the digest of the ledger)."""
    past, recipe, parts = (document.get(key, kind()) for key, kind in
                           (("past", list), ("recipe", dict), ("ledger", list)))  # fmt: skip
    check("base" not in document or is_digest(document["base"]), "bad base")
    fine = isinstance(past, list) and all(isinstance(line, list) and len(line) == 2 for line in past)
    check(
        fine and all(isinstance(a, str) and is_digest(b) for a, b in past), "past: lines of name and digest"
    )
    check(isinstance(recipe, dict) and isinstance(recipe.get("steps", []), list), "bad recipe")
    steps, seed = recipe.get("steps", []), recipe.get("seed", 0)
    check(all(isinstance(step, dict) and len(step) == 1 for step in steps), "bad steps")
    check(
        natural(seed) or (isinstance(seed, list) and len(seed) == len(steps)), "a seed, or one for each step"
    )
    seeds = seed if isinstance(seed, list) else [seed] * len(steps)
    check(all(map(natural, seeds)), "seeds are whole numbers")
    names = [*(name for name, _ in past), *(next(iter(step)) for step in steps)]
    held = {**document["sites"], **document.get("grids", {})}
    events = list(events_of(parts, len(past), names, held))
    digest = past[-1][1] if past else document.get("base", "")
    for number, (step, one) in enumerate(zip(steps, seeds, strict=True), len(past)):
        lines = [line_of(event) for event in events if event["step"] == number]
        text = json.dumps([digest, one, step, lines], sort_keys=True)
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
    check(isinstance(event, list) and len(event) >= 2, "ledger: an event is a list")
    about, how, *told = event
    if type(about) is int:
        check(0 <= about < len(held), "ledger: no such site or edge")
        about = list(held)[about]
    check(isinstance(about, str) and isinstance(how, str), "ledger: about and how")
    found = {"about": about, "how": how, "before": "", "after": "", "kind": "", "text": "", "data": {}}
    if how == "":
        check(2 <= len(told) <= 3 and all(map(isinstance, told, NOTE.values())), "ledger: a note")
        return found | dict(zip(NOTE, told, strict=False))
    check(how in EDITS or how in TELLS, "ledger: how")
    keys = TELLS.get(how, {})
    digests = told[len(keys) :]
    check(
        len(told) >= len(keys) and len(digests) <= (0 if how in ("set", "replace") else 2), "ledger: an event"
    )
    check(all(type(a) is b for a, b in zip(told, keys.values(), strict=False)), "ledger: what an event tells")
    found["data"] = dict(zip(keys, told, strict=False))
    if how not in ("set", "replace"):
        before, after = [*digests, None, None][:2]
        before = last.get(about) if before is None else before
        after = held.get(about, {}).get("digest") if after is None else after
        check(is_digest(before) or before == "", "ledger: before")
        check(is_digest(after), "ledger: after")
        last[about] = after
        found |= {"before": before, "after": after}
    return found
