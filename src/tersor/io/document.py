"""Document: the JSON of a file: sites, cuts, changes, attachments, aliases. docs/format.md section 4.

Values that follow from others are left out, such as a layer's name that follows from the site's.
ledger_json.py reads and writes the ledger, form_json.py the trees of forms.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tersor.core.state import Kept
from tersor.dtypes import NAMED
from tersor.errors import FormatError
from tersor.io.header import Slot, check_shape, natural
from tersor.io.json_text import Json, allowed, digest, of_type, only
from tersor.model.changes import Replace, Set
from tersor.model.sites import Site

DEFAULTS = {"dtype": "float32", "kind": "other", "axis": 0, "groups": 1}
KEYS = ("sites", "aliases", "indices", "changes", "grids", "attachments", "base", "past", "recipe", "ledger")
TINY = KEYS[:5]  # keys of a file with the short header; its sites and grids have no digests
INDICES = 1 << 20  # indices that the lists of a file may hold, plus one per byte of the file
TOO_LARGE = 1 << 31  # whole numbers must be below this
ATTACHMENT = "attachment:"  # prefix of an attachment's tensor name
UNFIT = re.compile(r"[\\:\x00-\x1f\x7f]")  # forbidden in an attachment's name, which may become a file name


class Listed(NamedTuple):
    """A list of distinct indices."""

    indices: tuple[int, ...]
    top: int  # the largest one


def site_to_json(site: Site, digest: str | None, tree: Any, kept: Mapping[int, int]) -> Json:
    """`kept`: the number of the list of kept indices, by cut axis."""
    entry: Json = {
        key: getattr(site, key) for key, default in DEFAULTS.items() if getattr(site, key) != default
    }
    entry |= {} if site.layer == site.name.rpartition(".")[0] else {"layer": site.layer}
    entry |= {"kept": {str(axis): number for axis, number in sorted(kept.items())}} if kept else {}
    entry |= {"origin": site.origin} if site.origin else {}
    entry |= {"digest": digest} if digest else {}
    return {"shape": list(site.shape), **entry, "form": tree}


def site_from_json(
    name: str, entry: Any, indices: Sequence[Listed] = (), *, tiny: bool = False
) -> tuple[Site, str, Any, dict[int, tuple[int, ...]]]:
    """(site, digest, tree, kept indices by axis). In a tiny file sites have no digest; it is "" then."""
    who = f"{name[:200]}: "
    entry = of_type(entry, dict, f"{who}a site")
    keys = ("shape", *DEFAULTS, "layer", "kept", "origin", *(() if tiny else ("digest",)), "form")
    only(entry, keys, f"{who}a site")
    facts = DEFAULTS | {"layer": name.rpartition(".")[0], "origin": ""} | entry
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


def shape_of(site: Site, kept: Kept) -> tuple[int, ...]:
    """The shape of a site as stored, after its cuts."""
    return tuple(len(kept[axis]) if axis in kept else count for axis, count in enumerate(site.shape))


def kept_from_json(
    entry: Any, shape: tuple[int, ...], indices: Sequence[Listed], who: str
) -> dict[int, tuple[int, ...]]:
    """Kept indices by axis: the given index of each index that is left."""
    kept = {}
    for word, number in of_type(entry, dict, f"{who}kept").items():
        axis = natural(word)
        if axis is None or str(axis) != word or axis >= len(shape):
            raise FormatError(f"{who}kept: {word[:20]!r} is no axis of {list(shape)}")
        if not 0 <= of_type(number, int, f"{who}kept: a list's number") < len(indices):
            raise FormatError(f"{who}kept: there is no list {number} in indices")
        found, top = indices[number]
        if top >= shape[axis]:
            raise FormatError(
                f"{who}kept: list {number} has index {top}, but axis {axis} has length {shape[axis]}"
            )
        kept[axis] = found
    return kept


def runs_of(indices: Sequence[int]) -> list[int]:
    """Indices as runs of consecutive numbers: [first, count, first, count, ...]."""
    runs: list[int] = []
    for index in indices:
        if runs and index == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [index, 1]
    return runs


def indices_from_json(entries: Any, nbytes: int) -> list[Listed]:
    """Lists of indices from their runs. FormatError for more indices than a file of `nbytes` may hold."""
    lists = of_type(entries, list, "indices")
    for number, runs in enumerate(lists):
        whole = isinstance(runs, list) and all(type(n) is int and 0 <= n < TOO_LARGE for n in runs)
        if not whole or len(runs) % 2 or not runs or not all(runs[1::2]):
            expected = f"must be [first, count, ...] of at least one index, not {str(runs)[:60]}"
            raise FormatError(f"indices: list {number} {expected}")
    count, room = sum(sum(runs[1::2]) for runs in lists), INDICES + nbytes
    if count > room:
        raise FormatError(f"indices: the lists hold {count:,} indices, but the file's bytes justify {room:,}")
    return [listed(number, runs) for number, runs in enumerate(lists)]


def listed(number: int, runs: list[int]) -> Listed:
    """A list of indices from its runs."""
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    ends = sorted((first, first + count) for first, count in pairs)
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(ends)):
        raise FormatError(f"indices: list {number} has an index twice")
    indices = tuple(index for first, count in pairs for index in range(first, first + count))
    return Listed(indices, ends[-1][1] - 1)


def changes_to_json(changes: Iterable[Set | Replace]) -> list[list[Any]]:
    return [
        ["set", change.module, change.attribute, change.value]
        if isinstance(change, Set)
        else ["replace", change.module, change.stock, dict(change.settings)]
        for change in changes
    ]


def changes_from_json(entries: Any) -> tuple[Set | Replace, ...]:
    return tuple(change_from_json(item) for item in of_type(entries, list, "changes"))


def change_from_json(item: Any) -> Set | Replace:
    """["set", module, attribute, value] or ["replace", module, stock, settings]."""
    kind = item[0] if isinstance(item, list) and len(item) == 4 else None
    if kind == "set":
        _, module, attribute, value = item
        who = "changes: a set's "
        if abs(of_type(value, int, f"{who}value")) >= TOO_LARGE:
            raise FormatError(f"{who}value is {value}, but whole numbers are below 2^31")
        return Set(of_type(module, str, f"{who}module"), of_type(attribute, str, f"{who}attribute"), value)
    if kind == "replace":
        _, module, stock, settings = item
        who = "changes: a replacement's "
        for key, value in of_type(settings, dict, f"{who}settings").items():
            fits = type(value) is str or (type(value) is int and abs(value) < TOO_LARGE)
            if not fits:
                raise FormatError(
                    f"{who}setting {key[:40]!r} must be a string or below 2^31, not {str(value)[:40]}"
                )
        return Replace(of_type(module, str, f"{who}module"), of_type(stock, str, f"{who}stock"), settings)
    raise FormatError(f"changes: an item is ['set', ...] or ['replace', ...] of four, not {str(item)[:60]}")


def attachment_name(name: str) -> str:
    """The name, if it can be a file name; else ValueError."""
    if UNFIT.search(name) or not all(part.strip(".") for part in name.split("/")):
        raise ValueError(
            f"{name[:100]!r} is no name of an attachment: no part between slashes may be empty or only dots, "
            f"and backslashes, colons and control characters are not allowed"
        )
    return name


def attachments_from_json(entries: Any, slots: Mapping[str, Slot]) -> dict[str, Json]:
    """The entry of each attachment. FormatError if its tensor is missing or its length is wrong."""
    for name, entry in of_type(entries, dict, "attachments").items():
        who = f"attachments: {name[:100]}"
        try:
            attachment_name(name)
        except ValueError as error:
            raise FormatError(f"attachments: {error}") from None
        only(of_type(entry, dict, who), ("nbytes", "sha256", "deflated"), who)
        slot, nbytes = slots.get(f"{ATTACHMENT}{name}"), of_type(entry.get("nbytes"), int, f"{who}: nbytes")
        if slot is None or slot.dtype is not NAMED["uint8"] or len(slot.shape) != 1:
            raise FormatError(f"{who} needs a tensor {ATTACHMENT}{name[:100]} of U8 in one dimension")
        if not re.fullmatch("[0-9a-f]{64}", of_type(entry.get("sha256"), str, f"{who}: sha256")):
            raise FormatError(f"{who}: sha256 must be 64 hex digits")
        if of_type(entry.get("deflated", False), bool, f"{who}: deflated"):
            if not slot.nbytes < nbytes <= allowed(slot.nbytes):
                most = f"{slot.nbytes:,} deflated bytes justify up to {allowed(slot.nbytes):,}"
                raise FormatError(f"{who} states {nbytes:,} bytes, but {most}, and more than they are")
        elif nbytes != slot.nbytes:
            raise FormatError(f"{who} states {nbytes:,} bytes, but its tensor has {slot.nbytes:,}")
    return dict(entries)


def edges_from_json(entries: Any, sites: Mapping[str, Site], *, tiny: bool) -> Iterator[tuple[str, str, Any]]:
    """(edge, digest, tree) of each grid. In a tiny file grids have no digest; it is "" then."""
    for edge, entry in of_type(entries, dict, "grids").items():
        who = f"grids: {edge[:200]}"
        if edge in sites:
            raise FormatError(f"{who}: a site has this name")
        only(of_type(entry, dict, who), ("form",) if tiny else ("digest", "form"), who)
        yield edge, "" if tiny else digest(entry.get("digest"), f"{who}: digest"), entry.get("form")


def aliases_from_json(entries: Any, sites: Mapping[str, Site]) -> dict[str, str]:
    for alias, name in of_type(entries, dict, "aliases").items():
        if not isinstance(name, str) or name not in sites or alias in sites:
            raise FormatError(f"aliases: {alias[:100]!r} cannot stand for {str(name)[:100]!r}")
    return dict(entries)
