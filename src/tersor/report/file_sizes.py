"""File sizes: the facts and lines of `pack`, `unpack`, `diff`, `patch` and `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tersor.errors import few
from tersor.measure.accuracy import in_words
from tersor.measure.nbytes import file_nbytes
from tersor.report.console import whole
from tersor.steps.few_bits import better

Facts = Mapping[str, Any]
SHOWN = 6  # names in a line


def sizes(before: Path, after: Path, tensors: int | None = None, nbytes: int | None = None) -> dict[str, Any]:
    """Two files (or folders), one made from the other. `tensors`: bytes of its tensors, if only some were
    used. `nbytes`: of the files that were read, if a folder has others."""
    found: dict[str, Any] = {
        "from": {"name": str(before), "nbytes": file_nbytes(before) if nbytes is None else nbytes},
        "to": {"name": str(after), "nbytes": file_nbytes(after)},
    }
    if tensors is not None:
        found["from"]["tensors_nbytes"] = tensors
    return found | {"share": share(found["from"], found["to"])}


def share(of: Facts, part: Facts) -> float:
    """A file's bytes as a fraction of another file's, or of its tensors' if only these were used."""
    return float(part["nbytes"] / max(of.get("tensors_nbytes", of["nbytes"]), 1))


def named(file: Facts, word: str) -> str:
    """A file and its bytes; and those of its tensors if only some were used, since these are compared."""
    text = f"{file['name']}: {whole(file['nbytes'])} bytes"
    return (
        f"{text}, {whole(file['tensors_nbytes'])} in the tensors that were {word}"
        if "tensors_nbytes" in file
        else text
    )


def meant(nbytes: int, ignored: Mapping[str, int | None]) -> int | None:
    """Bytes of the tensors if others were left out, since the file's own bytes cannot be compared then."""
    return nbytes if any(ignored.values()) else None


def packed(before: Path, after: Path, done: Any, steps: Iterable[Any]) -> dict[str, Any]:
    """The sizes, with the results of io.pack. Only files that were packed count. `steps`: what was done."""
    along = sum(done.attached.values())
    return sizes(before, after, meant(done.before + along, done.ignored), done.read + along) | {
        "tensors": done.tensors,
        "aliases": dict(done.aliases),
        "key": done.key,
        "left": {kind: list(names) for kind, names in done.left.items()},
        "attached": dict(done.attached),
        "ignored": dict(done.ignored),
        "reasons": dict(done.reasons),
        **({"stripped": done.stripped} if done.stripped else {}),
        "advice": [text for step in steps if step.name == "quantize" and (text := better(step))],
    }


def packed_lines(facts: Facts) -> Iterator[str]:
    yield from lines(facts)
    if facts["aliases"]:
        yield f"stored once: {few((f'{a} = {b}' for a, b in facts['aliases'].items()), SHOWN)}"
    for kind, names in facts["left"].items():
        yield f"left as it is ({kind}): {few(names, SHOWN)}"
    if facts["key"]:
        yield f"of the checkpoint: {facts['key']}"
    if "stripped" in facts:
        yield f"names without the prefix {facts['stripped']!r}, which a wrapper had given to all of them"
    if facts["attached"]:
        total = whole(sum(facts["attached"].values()))
        yield f"attached: {few(facts['attached'], SHOWN)} ({total} bytes)"
    yield from left_out(facts["ignored"], facts["reasons"])
    yield from facts["advice"]


def left_out(ignored: Mapping[str, int | None], reasons: Mapping[str, str]) -> Iterator[str]:
    if ignored:
        parts = (counted(name, tensors, reasons.get(name, "a file")) for name, tensors in ignored.items())
        yield f"left out: {few(parts, SHOWN)}"


def counted(name: str, tensors: int | None, why: str = "a file") -> str:
    """One part that was left out: a key with the number of its tensors, or a file that was not opened."""
    if tensors is None:
        return f"{name} ({why})"
    return f"{name} ({tensors} tensor{'s' * (tensors > 1)})" if tensors else name


def rounded_lines(facts: Facts) -> Iterator[str]:
    yield from lines(facts)
    decided = facts["decided"]
    samples = (
        f"{decided['found']['n']} {'calibration' if decided['set'] == 'calibrate' else 'training'} samples"
    )
    yield f"{facts['task']}: {in_words(facts['accuracy'])}, {facts['max_drop']:g} allowed"
    yield f"{samples} decided, the evaluation set only judged"


def lines(facts: Facts) -> Iterator[str]:
    before, after, of = facts["from"], facts["to"], facts["share"]
    change = f"{1 / of:.2f} x smaller" if of < 1 else f"{of:.2f} x larger"
    than = " than these tensors" if "tensors_nbytes" in before else ""
    yield named(before, "packed")
    yield f"{named(after, '')}, {change}{than}"


def unpacked(file: Path, out: Path, only: list[str], other_network: str) -> dict[str, Any]:
    """The sizes after io.unpack; without their share if `only` some tensors were written. `other_network`:
    what the tensors alone do not show of it."""
    facts = sizes(file, out) | {"only": only, "other_network": other_network}
    if only:
        del facts["share"]
    return facts


def unpacked_lines(facts: Facts) -> Iterator[str]:
    """Two files. If only some tensors were unpacked, their bytes are not compared with those of all."""
    yield from ((named(facts[word], "") for word in ("from", "to")) if facts["only"] else lines(facts))
    if facts["other_network"]:
        yield (
            f"{facts['other_network']}. In the class as it was these tensors are another network: "
            f"tersor.load({facts['from']['name']!r}).model(net) builds this one"
        )


def diffed(old: Path, new: Path, patch: Path, done: Any) -> dict[str, Any]:
    """A patch, with the results of io.diff."""
    files = {"old": old, "new": new, "patch": patch}
    found: dict[str, Any] = {
        word: {"name": str(path), "nbytes": file_nbytes(path)} for word, path in files.items()
    }
    found["new"]["nbytes"] = done.read
    if (tensors := meant(done.tensors, done.ignored)) is not None:
        found["new"]["tensors_nbytes"] = tensors
    found["share"] = share(found["new"], found["patch"])
    arrays = {"same": done.same, "changed": done.changed, "alone": done.alone}
    return found | {"arrays": arrays, "ignored": dict(done.ignored), "reasons": dict(done.reasons)}


def diffed_lines(facts: Facts) -> Iterator[str]:
    new, patch, arrays = facts["new"], facts["patch"], facts["arrays"]
    of = "these tensors" if "tensors_nbytes" in new else "it"
    yield named(new, "compared")
    yield f"{named(patch, '')}, {facts['share']:.1%} of {of}"
    kinds = {"the same": "same", "stored as residuals": "changed", "stored whole": "alone"}
    yield "arrays: " + ", ".join(f"{whole(arrays[key])} {words}" for words, key in kinds.items())
    yield from left_out(facts["ignored"], facts["reasons"])


def patched(old: Path, patch: Path, new: Path) -> dict[str, Any]:
    """The facts of a file that a patch made."""
    return sizes(old, new) | {"patch": {"name": str(patch), "nbytes": file_nbytes(patch)}}


def patched_lines(facts: Facts) -> Iterator[str]:
    yield f"{facts['to']['name']}: {whole(facts['to']['nbytes'])} bytes, the same as given to diff"


def verified(path: Path, checks: Iterable[Any]) -> dict[str, Any]:
    """The facts of io.verify: the file and each of its sites, sound or not."""
    found = [asdict(check) for check in checks]
    return {
        "file": {"name": str(path), "nbytes": file_nbytes(path)},
        "sound": all(check["sound"] for check in found),
        "checks": found,
    }


def verified_lines(facts: Facts) -> Iterator[str]:
    """One line for each damaged part, then one for the whole file."""
    damaged = [check for check in facts["checks"] if not check["sound"]]
    yield from (f"damaged: {check['site'] or 'the file'}: {check['text']}" for check in damaged)
    parts = sum(bool(check["site"]) for check in facts["checks"])  # weights, grids, attachments
    state = f"{len(damaged)} faults" if damaged else "sound"
    yield f"{facts['file']['name']}: {whole(facts['file']['nbytes'])} bytes, {parts} parts, {state}"
