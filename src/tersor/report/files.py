"""Files: what `pack`, `unpack`, `diff`, `patch` and `verify` say: files made of others, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tersor.measure.nbytes import file_nbytes
from tersor.report.console import whole

SHOWN = 6  # names in a line


def sizes(before: Path, after: Path) -> dict[str, Any]:
    """Two files (or folders), one made from the other."""
    return {
        "from": {"name": str(before), "nbytes": file_nbytes(before)},
        "to": {"name": str(after), "nbytes": file_nbytes(after)},
    }


def packed(before: Path, after: Path, done: Any) -> dict[str, Any]:
    """The same, with what io.pack says that it did."""
    return sizes(before, after) | {
        "tensors": done.tensors,
        "aliases": dict(done.aliases),
        "key": done.key,
        "ignored": dict(done.ignored),
    }


def packed_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from lines(facts)
    if facts["aliases"]:
        yield f"stored once: {listing([f'{a} = {b}' for a, b in facts['aliases'].items()])}"
    if facts["key"]:
        yield f"of the checkpoint: {facts['key']}"
    yield from left_out(facts["ignored"])


def left_out(ignored: Mapping[str, int | None]) -> Iterator[str]:
    if ignored:
        yield f"left out: {listing([counted(*item) for item in ignored.items()])}"


def counted(name: str, tensors: int | None) -> str:
    """What was left out: a key with the tensors under it, or a file that was not opened."""
    if tensors is None:
        return f"{name} (a file)"
    return f"{name} ({tensors} tensor{'s' * (tensors > 1)})" if tensors else name


def rounded_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from lines(facts)
    was, now, fall = (facts["accuracy"][key][0] for key in ("before", "after", "drop"))
    allowed = f"{facts['max_drop']:g} allowed"
    yield f"{facts['task']}: {was:.4f} to {now:.4f}, drop {fall:+.2f} points, {allowed}"


def listing(names: list[str]) -> str:
    """Names in a line that stays short."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    before, after = facts["from"], facts["to"]
    share = after["nbytes"] / max(before["nbytes"], 1)
    change = f"{1 / share:.2f} x smaller" if share < 1 else f"{share:.2f} x larger"
    yield f"{before['name']}: {whole(before['nbytes'])} bytes"
    yield f"{after['name']}: {whole(after['nbytes'])} bytes, {change}"


def told(old: Path, new: Path, patch: Path, done: Any) -> dict[str, Any]:
    """A patch, with what io.diff says that it did."""
    files = {"old": old, "new": new, "patch": patch}
    found: dict[str, Any] = {
        word: {"name": str(path), "nbytes": file_nbytes(path)} for word, path in files.items()
    }
    arrays = {"same": done.same, "changed": done.changed, "alone": done.alone}
    return found | {"arrays": arrays, "ignored": dict(done.ignored)}


def told_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    new, patch, arrays = facts["new"], facts["patch"], facts["arrays"]
    share = patch["nbytes"] / max(new["nbytes"], 1)
    yield f"{new['name']}: {whole(new['nbytes'])} bytes"
    yield f"{patch['name']}: {whole(patch['nbytes'])} bytes, {share:.1%} of it"
    told = {"the same": "same", "told by an old one": "changed", "told alone": "alone"}
    yield "arrays: " + ", ".join(f"{whole(arrays[key])} {words}" for words, key in told.items())
    yield from left_out(facts["ignored"])


def patched(old: Path, patch: Path, new: Path) -> dict[str, Any]:
    """The file that a patch made."""
    return sizes(old, new) | {"patch": {"name": str(patch), "nbytes": file_nbytes(patch)}}


def patched_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{facts['to']['name']}: {whole(facts['to']['nbytes'])} bytes, as they were given to diff"


def verified(path: Path, checks: Iterable[Any]) -> dict[str, Any]:
    """The facts of io.verify: the file and each of its sites, sound or not."""
    found = [asdict(check) for check in checks]
    return {
        "file": {"name": str(path), "nbytes": file_nbytes(path)},
        "sound": all(check["sound"] for check in found),
        "checks": found,
    }


def verified_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is damaged, one line each; then how the file is as a whole."""
    damaged = [check for check in facts["checks"] if not check["sound"]]
    yield from (f"damaged: {check['site'] or 'the file'}: {check['text']}" for check in damaged)
    sites = sum(bool(check["site"]) for check in facts["checks"])
    state = f"{len(damaged)} faults" if damaged else "sound"
    yield f"{facts['file']['name']}: {whole(facts['file']['nbytes'])} bytes, {sites} tensors, {state}"
