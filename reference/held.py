"""Held: section 4 of docs/format.md, the contents of a file. Does not use Tersor or PyTorch."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from formulas import NUMPY, Array, check
from words import below_31_bits, check_shape, is_digest, natural

# Sites

SITE = {"dtype": "float32", "kind": "other", "axis": 0, "groups": 1, "kept": {}, "origin": ""}


def check_site(site: Any, lists: list[list[int]], *, signed: bool = True) -> dict[str, Any]:
    """The site with defaults filled in, and its stored shape as `stored`."""
    keys = {"form", "shape", "layer", *SITE} | ({"digest"} if signed else set())
    check(isinstance(site, dict) and set(site) <= keys, "unknown keys")
    site = SITE | site
    site["shape"] = check_shape(site.get("shape"))
    check(isinstance(site["dtype"], str) and site["dtype"] in NUMPY, "bad dtype")
    texts = (site["kind"], site.get("layer", ""), site["origin"])
    check(all(isinstance(text, str) for text in texts), "kind, layer and origin must be strings")
    check(natural(site["axis"]) and site["axis"] < max(len(site["shape"]), 1), "bad axis")
    check(natural(site["groups"]) and site["groups"] > 0, "bad groups")
    check(not signed or is_digest(site.get("digest")), "bad digest")
    return site | {"stored": stored(site["shape"], site["kept"], lists)}


# Cuts


def lists_of(indices: Any, nbytes: int) -> list[list[int]]:
    """The index lists of a file of `nbytes` bytes."""
    check(
        isinstance(indices, list) and all(isinstance(runs, list) for runs in indices), "indices must be lists"
    )
    fine = all(runs and len(runs) % 2 == 0 and all(map(below_31_bits, runs)) for runs in indices)
    check(
        fine and all(min(runs[1::2]) >= 1 for runs in indices), "indices: not first, count, first, count, ..."
    )
    total = sum(sum(runs[1::2]) for runs in indices)
    check(total <= 1_048_576 + nbytes, "more indices than the file's size allows")
    lists = [
        [first + i for first, count in zip(runs[::2], runs[1::2], strict=True) for i in range(count)]
        for runs in indices
    ]
    check(all(len(set(numbers)) == len(numbers) for numbers in lists), "a duplicate index")
    return lists


def stored(shape: tuple[int, ...], kept: Any, lists: list[list[int]]) -> tuple[int, ...]:
    """The stored shape of a site, after cuts."""
    check(isinstance(kept, dict), "kept must be an object")
    lengths = list(shape)
    for axis, number in kept.items():
        check(axis in map(str, range(len(shape))), f"no axis {axis} to cut")
        check(natural(number) and number < len(lists), f"no list {number}")
        check(max(lists[number]) < shape[int(axis)], "an index beyond the axis")
        lengths[int(axis)] = len(lists[number])
    return tuple(lengths)


# Changes


def check_changes(changes: Any) -> None:
    check(isinstance(changes, list), "changes must be a list")
    for change in changes:
        check(isinstance(change, list) and len(change) == 4, "a change must have four parts")
        kind, module, what, value = change
        check(kind in ("set", "replace") and isinstance(module, str) and isinstance(what, str), "bad change")
        if kind == "set":
            check(small(value), "a value beyond 2^31")
        else:
            fine = isinstance(value, dict) and all(isinstance(v, str) or small(v) for v in value.values())
            check(fine, "settings must be strings and numbers below 2^31")


def small(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**31


# Grids: sections 5 and 6 define their trees


def check_grids(grids: Any, sites: dict[str, Any], *, signed: bool) -> dict[str, Any]:
    keys = {"form", "digest"} if signed else {"form"}
    check(isinstance(grids, dict), "grids must be an object")
    for edge, grid in grids.items():
        check(edge not in sites, f"{edge}: both a site and an edge")
        check(isinstance(grid, dict) and set(grid) == keys, f"{edge}: keys")
        check(not signed or is_digest(grid["digest"]), f"{edge}: digest")
    return grids


# Attachments


def attachment_of(name: str, entry: Any, tensors: dict[str, Array], inflated: Any) -> bytes:
    """The bytes of an attachment, checked against its SHA-256."""
    parts = name.split("/")
    check(all(part.strip(".") for part in parts), f"{name!r} is no path below a folder")
    check(not re.search(r"[\\:\x00-\x1f\x7f]", name), f"{name!r} has a character that is not allowed")
    check(isinstance(entry, dict) and set(entry) <= {"nbytes", "sha256", "deflated"}, f"{name}: keys")
    nbytes, tensor = entry.get("nbytes"), tensors.get(f"attachment:{name}")
    check(natural(nbytes) and isinstance(entry.get("sha256"), str), f"{name}: nbytes or sha256")
    check(tensor is not None and tensor.dtype == "uint8" and tensor.values.ndim == 1, f"{name}: no tensor")
    data, deflated = tensor.values.tobytes(), entry.get("deflated", False)
    check(type(deflated) is bool, f"{name}: deflated")
    if deflated:
        check(len(data) < nbytes <= 65536 + 32 * len(data), f"{name}: more bytes than its size allows")
        data, rest = inflated(data, nbytes)
        check(not rest, f"{name}: extra bytes after it")
    check(len(data) == nbytes and hashlib.sha256(data).hexdigest() == entry["sha256"], f"{name}: damaged")
    return data
