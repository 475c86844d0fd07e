"""Diff: write a patch that makes a later file of weights from an earlier one. docs/format.md section 12.

diff    codes each array of NEW against the OLD array that gives the fewest bytes: same name, else same shape
size    equal arrays cost nothing; a changed code or float costs about the bits of its difference
A .tersor file or a single .safetensors is restored byte for byte, another checkpoint as one .safetensors.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from tersor.encode import coded
from tersor.errors import FormatError, RefusedError
from tersor.files import atomic, output
from tersor.forms import PROFILES, Coded
from tersor.forms.form import as_bytes
from tersor.io.folder import inputs_of
from tersor.io.header import build_header
from tersor.io.json_text import Json, deflate, dump, parse
from tersor.io.patch.named_arrays import PATCH, NamedArrays, regrid
from tersor.io.patch.patch import NUMBER, STREAMS, TEXT, Hashing, in_order, large_of, slots_of, write
from tersor.io.patch.patch_reader import ALONE, CHANGE, SAME, PatchReader, movable
from tersor.io.patch.residual import fitted, residual_streams
from tersor.io.safetensors_file import CHUNK, IN_MEMORY
from tersor.record.observer import Observer

SAMPLE = 1 << 14  # elements sampled to estimate the bytes of an array
MOST = 4  # OLD arrays with another name that are tried


@dataclass(frozen=True)
class Delta:
    """The result of diff()."""

    nbytes: int  # size of the patch
    same: int  # arrays of NEW that are also in OLD
    changed: int  # arrays coded against one of OLD
    alone: int  # arrays coded without OLD
    ignored: Mapping[str, int | None]  # other contents of NEW -> tensors in them; None: a file not opened
    reasons: Mapping[str, str]  # why some of these were left out
    tensors: int = 0  # bytes of the tensors of NEW if it is a checkpoint
    read: int = 0  # bytes of the files of NEW that were read


def diff(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    observer: Observer | None = None,
) -> Delta:
    """Write a patch from OLD to NEW; each is a .tersor file or a checkpoint.

    The patch is applied once before it is put in place, to check that it makes NEW. FormatError for a damaged
    file, RefusedError if no patch can make NEW.
    """
    out, observer = output(out, [*inputs_of(old), *inputs_of(new)]), observer or Observer()
    folder = out.parent
    with ExitStack() as stack:
        before = stack.enter_context(NamedArrays(old))
        after = stack.enter_context(NamedArrays(new))
        file = stack.enter_context(atomic(out))
        draft = stack.enter_context(Spool(folder)).fill(before, after, observer)
        if draft is None and after.tersor is not None and not after.tersor.source.tiny:
            # Another version wrote NEW, and this one writes its text differently: patch its bytes instead.
            after = stack.enter_context(NamedArrays(new, plain=True))
            draft = stack.enter_context(Spool(folder)).fill(before, after, observer)
        if draft is None:
            raise RefusedError(
                f"{new}: this version of tersor would write it differently. Write it again: "
                "tersor.save(tersor.load(NEW), NEW, tiny=True)"
            )
        nbytes = write_patch(file, draft, before)
        hows = [draft.parts.get(name, {"how": SAME}).get("how", CHANGE) for name in after.names]
        same, changed, alone = (hows.count(how) for how in (SAME, CHANGE, ALONE))
        tensors = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in after.slots.values())
        return Delta(nbytes, same, changed, alone, after.ignored, after.reasons, tensors, after.nbytes)


class Draft(NamedTuple):
    """A patch before it is written."""

    text: bytes
    parts: Json
    new: str  # SHA-256 of NEW
    streams: Spool


class Spool:
    """Streams collected before the text is known, in memory or on disk."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self.folder = folder
        self.nbytes = self.crc = 0

    def add(self, stream: bytes) -> int:
        """Add a stream. Returns its number of bytes."""
        self.file.write(stream)
        self.crc = zlib.crc32(stream, self.crc)
        self.nbytes += len(stream)
        return len(stream)

    def read(self, begin: int, end: int) -> bytes:
        self.file.seek(begin)
        return self.file.read(end - begin)

    def fill(self, before: NamedArrays, after: NamedArrays, observer: Observer) -> Draft | None:
        """Code every array, then apply the patch. None if that does not give NEW byte for byte."""
        facts, digest = facts_of(before, after)
        encoder, total, parts = Encoder(before, after), 2 * len(after.names), {}
        for number, name in enumerate(after.names, 1):
            part, streams = encoder.part(name)
            part |= {"n": lengths} if (lengths := [self.add(stream) for stream in streams]) else {}
            if part != {"how": SAME}:
                parts[name] = part
            observer.progress(number, total, name)
        text = dump(facts | {"parts": parts})
        again, folder = Hashing(), self.folder
        try:
            write(
                PatchReader(parse(text, "its text"), self.read, self.nbytes, before),
                again,
                folder,
                SecondHalf(observer),
            )
        except FormatError as error:
            raise RefusedError(f"{after.path}: no patch can make it: {error}") from None
        return Draft(text, parts, digest, self) if again.sha.hexdigest() == digest else None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


class SecondHalf(Observer):
    """Reports progress to another observer as the second half of a whole."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.observer.progress(total + done, 2 * total, text)


def facts_of(before: NamedArrays, after: NamedArrays) -> tuple[Json, str]:
    """(the entries of the patch about NEW as a whole, the SHA-256 of the file that it makes)."""
    if after.tersor is not None:
        facts: Json = {"kind": "tersor"} | ({"tiny": True} if after.tersor.source.tiny else {})
        large = large_of(after.tersor)
        alike = (
            before.tersor is not None and large == large_of(before.tersor) and before.head() == after.head()
        )
        facts |= {} if alike else {"text": after.tersor.text, "large": large}
        return facts, after.digest()
    head = after.head()
    facts, digest = {"kind": "safetensors"}, after.digest() if head else ""
    if not head:
        head = single_header(after)
        digest = digest_of(after, head)
    facts |= {"aliases": dict(after.aliases)} if after.aliases else {}
    return facts if before.head() == head else facts | {"head": head.decode()}, digest


def single_header(after: NamedArrays) -> bytes:
    """The header of a checkpoint as one safetensors file, with tied tensors under each of their names."""
    own = {name: after.slots[after.aliases.get(name, name)] for name in (*after.names, *after.aliases)}
    order = sorted(own.items(), key=lambda item: -item[1].dtype.itemsize)  # wide elements first: aligned
    entries = [
        (name, slot.dtype, slot.shape, slot.dtype.itemsize * math.prod(slot.shape)) for name, slot in order
    ]
    return build_header(entries, {})[8:]


def digest_of(after: NamedArrays, head: bytes) -> str:
    """SHA-256 of a checkpoint's tensors as one safetensors file with this header."""
    sha = hashlib.sha256(len(head).to_bytes(8, "little") + head)
    for name in in_order(slots_of(head)):
        sha.update(as_bytes(after.array(after.aliases.get(name, name))).data)
    return sha.hexdigest()


class Target(NamedTuple):
    """An array of NEW to be coded."""

    array: Tensor
    part: Json  # entries of its part that do not depend on the base
    keep: Tensor | None = None


class Encoder:
    """Codes each array of NEW against the OLD array that gives the fewest bytes."""

    def __init__(self, before: NamedArrays, after: NamedArrays) -> None:
        self.before, self.after = before, after
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.twins: dict[str, str] = {}  # digest of an array, or of a stored leaf -> its name in OLD
        for name in before.names:
            array = before.array(name)
            self.kinds[name] = array.dtype, tuple(array.shape)
            self.twins.setdefault(digest_array(array), name)
            if before.tersor is not None:
                self.twins.setdefault(before.leaf(name).stored.digest, name)
        kept = set(after.names)
        self.gone: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}  # by kind: names that NEW lacks
        for name in before.names:
            if name not in kept:
                self.gone.setdefault(self.kinds[name], []).append(name)

    def part(self, name: str) -> tuple[Json, Iterator[bytes]]:
        """(the part of an array, its streams)."""
        if self.after.tersor is not None:
            stored = self.after.leaf(name).stored
            if isinstance(stored, Coded) and stored.digest in self.twins:
                return self.same(name, stored.digest), iter(())
        target = self.target(name)
        digest = digest_array(target.array)
        if digest in self.twins:
            return target.part | self.same(name, digest), iter(())
        base, found = self.nearest(name, target)
        return target.part | found, residual_streams(target.array, base, target.keep)

    def same(self, name: str, digest: str) -> Json:
        twin = self.twins[digest]
        return {"how": SAME} | ({} if twin == name else {"of": twin})

    def target(self, name: str) -> Target:
        """An array of NEW; a coded leaf is decoded if coding it again gives the same bytes."""
        if self.after.tersor is None:
            return Target(self.after.array(name), {})
        leaf = self.after.leaf(name)
        if not isinstance(leaf.stored, Coded):
            return Target(leaf.array, {})
        keep = self.after.array(leaf.keep) if leaf.keep else None
        known = leaf.keep is None or (leaf.keep != "" and self.is_decoded(leaf.keep))
        profile = profile_of(leaf.stored, leaf.array, keep) if known else ""
        if not profile:
            return Target(leaf.stored.data, {})
        return Target(leaf.array, {"coder": profile} | ({"keep": leaf.keep} if leaf.keep else {}), keep)

    def is_decoded(self, mask: str) -> bool:
        """Whether the reader of the patch has a mask's elements, and not only its stored bytes."""
        stored = self.after.leaf(mask).stored
        return (
            not isinstance(stored, Coded) or stored.digest in self.twins or "coder" in self.target(mask).part
        )

    def nearest(self, name: str, target: Target) -> tuple[Tensor | None, Json]:
        """(the base with the fewest bytes, the entries of the part that name it)."""
        best: tuple[Tensor | None, Json] = (None, {"how": ALONE})
        least = cost(target, None)
        for other in self.candidates(name, target.array):
            found = fitted(self.before.array(other), tuple(target.array.shape), target.array.dtype)
            if found is None:
                continue
            named = {} if other == name else {"of": other}
            for base, entries in ((found, named), *self.regridded(name, other, found, named)):
                nbytes = cost(target, base)
                if nbytes < least:
                    least, best = nbytes, (base, entries)
        return best

    def candidates(self, name: str, array: Tensor) -> list[str]:
        """The OLD array of this name, else some that NEW lacks: the array may have been renamed."""
        if name in self.kinds:
            return [name]
        return self.gone.get((array.dtype, tuple(array.shape)), [])[:MOST]

    def regridded(self, name: str, other: str, found: Tensor, named: Json) -> Iterator[tuple[Tensor, Json]]:
        """Old codes rounded to the new grid, if both are codes on uniform grids."""
        if self.before.tersor is None or self.after.tersor is None:
            return
        old, new = self.before.leaf(other).grid, self.after.leaf(name).grid
        if old is not None and new is not None and movable(found, old, new):
            yield regrid(found, old, new), named | {"grid": True}


def digest_array(array: Tensor) -> str:
    sha = hashlib.sha256(f"{array.dtype} {tuple(array.shape)} ".encode())
    sha.update(as_bytes(array).data)
    return sha.hexdigest()


def cost(target: Target, base: Tensor | None) -> int:
    """Estimated bytes with this base: those of a sample of rows."""
    array, _, keep = target
    step = max(1, array.numel() // SAMPLE)
    if step > 1 and array.ndim and array.shape[0] > step:
        array = array[::step].contiguous()
        base = None if base is None else base[::step].contiguous()
        keep = None if keep is None else keep[::step].contiguous()
    return sum(map(len, residual_streams(array, base, keep, "fast")))


def profile_of(stored: Coded, array: Tensor, keep: Tensor | None) -> str:
    """The profile that codes the array to the stored bytes; "" if none does."""
    for profile in dict.fromkeys((stored.coder, *PROFILES)):
        if coded(array, keep, profile).replace(coder=stored.coder).digest == stored.digest:
            return profile
    return ""


def write_patch(file: BinaryIO, draft: Draft, before: NamedArrays) -> int:
    """Write text and streams as a safetensors file. Returns its size in bytes."""
    text, streams = deflate(draft.text, head=before.head()), draft.streams
    metadata = {
        PATCH: str(NUMBER), "old": before.digest(), "new": draft.new, "size": str(len(draft.text)),
        "crc": f"{zlib.crc32(draft.text):08x}{streams.crc:08x}",
    }  # fmt: skip
    sizes = {TEXT: len(text), STREAMS: streams.nbytes}
    header = build_header([(name, torch.uint8, (n,), n) for name, n in sizes.items()], metadata)
    file.write(header + text)
    for begin in range(0, streams.nbytes, CHUNK):
        file.write(streams.read(begin, min(begin + CHUNK, streams.nbytes)))
    return len(header) + len(text) + streams.nbytes
