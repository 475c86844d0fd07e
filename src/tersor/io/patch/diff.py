"""Delta: what changed from one file of weights to the next, as a patch. docs/format.md section 12.

diff    each array of NEW told by the one of OLD that tells it shortest: same name, else same shape, else none
size    what is the same costs nothing, a code or float that moved about the bits of its move
.tersor files and single .safetensors come back with every byte, others as one .safetensors of their tensors.
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
from tersor.io.checkpoint import read_from
from tersor.io.header import build_header
from tersor.io.json_text import Json, deflate, dump, parse
from tersor.io.patch.named_arrays import PATCH, NamedArrays, regrid
from tersor.io.patch.patch import NUMBER, STREAMS, TEXT, Hashing, in_order, large_of, slots_of, write
from tersor.io.patch.patch_reader import ALONE, CHANGE, SAME, PatchReader, movable
from tersor.io.patch.residual import fitted, tell
from tersor.io.safetensors_file import CHUNK, IN_MEMORY
from tersor.record.observer import Observer

SAMPLE = 1 << 14  # elements that tell which array of OLD is nearest
MOST = 4  # arrays of OLD with another name that are tried


@dataclass(frozen=True)
class Delta:
    """What diff did."""

    nbytes: int  # of the patch
    same: int  # arrays of NEW that OLD has
    changed: int  # told by one of OLD
    alone: int  # told without
    ignored: Mapping[
        str, int | None
    ]  # what NEW holds besides, and the tensors in it; None: a file not opened
    tensors: int = 0  # bytes of those of NEW that were told; of a .tersor file none, for all of it is


def diff(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    observer: Observer | None = None,
) -> Delta:
    """Write what makes NEW of OLD: .tersor files and checkpoints, in any pairing.

    NEW is made once before the patch is put in place: it can be made. FormatError where a file is not sound.
    """
    out, observer = output(out, [*read_from(old), *read_from(new)]), observer or Observer()
    folder = out.parent
    with ExitStack() as stack:
        before = stack.enter_context(NamedArrays(old))
        after = stack.enter_context(NamedArrays(new))
        file = stack.enter_context(atomic(out))
        told = stack.enter_context(Spool(folder)).fill(before, after, observer)
        if told is None and after.tersor is not None and not after.tersor.source.tiny:
            # Another version wrote NEW, and its text comes out otherwise: keep its bytes instead.
            after = stack.enter_context(NamedArrays(new, plain=True))
            told = stack.enter_context(Spool(folder)).fill(before, after, observer)
        if told is None:
            raise RefusedError(
                f"{new}: this version of tersor would write it otherwise. Write it anew: "
                "tersor.save(tersor.load(NEW), NEW, tiny=True)"
            )
        nbytes = write_patch(file, told, before)
        hows = [told.parts.get(name, {"how": SAME}).get("how", CHANGE) for name in after.names]
        same, changed, alone = (hows.count(how) for how in (SAME, CHANGE, ALONE))
        tensors = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in after.slots.values())
        return Delta(nbytes, same, changed, alone, after.ignored, tensors)


class Finished(NamedTuple):
    """A patch before it is written."""

    text: bytes
    parts: Json
    new: str  # SHA-256
    streams: Spool


class Spool:
    """Streams that wait for the text, in memory or on disk."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self.folder = folder
        self.nbytes = self.crc = 0

    def add(self, stream: bytes) -> int:
        """Its bytes."""
        self.file.write(stream)
        self.crc = zlib.crc32(stream, self.crc)
        self.nbytes += len(stream)
        return len(stream)

    def read(self, begin: int, end: int) -> bytes:
        self.file.seek(begin)
        return self.file.read(end - begin)

    def fill(self, before: NamedArrays, after: NamedArrays, observer: Observer) -> Finished | None:
        """Tell every array; None where the new file does not come back with every byte."""
        told, digest = frame(before, after)
        telling, total, parts = Telling(before, after), 2 * len(after.names), {}
        for number, name in enumerate(after.names, 1):
            part, streams = telling.part(name)
            part |= {"n": lengths} if (lengths := [self.add(stream) for stream in streams]) else {}
            if part != {"how": SAME}:
                parts[name] = part
            observer.progress(number, total, name)
        text = dump(told | {"parts": parts})
        again, folder = Hashing(), self.folder
        try:
            write(
                PatchReader(parse(text, "its text"), self.read, self.nbytes, before),
                again,
                folder,
                Second(observer),
            )
        except FormatError as error:
            raise RefusedError(f"{after.path}: no patch can tell it: {error}") from None
        return Finished(text, parts, digest, self) if again.sha.hexdigest() == digest else None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


class Second(Observer):
    """The second half of the progress that another observer is told."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.observer.progress(total + done, 2 * total, text)


def frame(before: NamedArrays, after: NamedArrays) -> tuple[Json, str]:
    """(what the patch must say of NEW besides its arrays, the SHA-256 of the file it makes)."""
    if after.tersor is not None:
        told: Json = {"kind": "tersor"} | ({"tiny": True} if after.tersor.source.tiny else {})
        large = large_of(after.tersor)
        alike = (
            before.tersor is not None and large == large_of(before.tersor) and before.head() == after.head()
        )
        told |= {} if alike else {"text": after.tersor.text, "large": large}
        return told, after.digest()
    head = after.head()
    told, digest = {"kind": "safetensors"}, after.digest() if head else ""
    if not head:
        head = one_header(after)
        digest = digest_of(after, head)
    told |= {"aliases": dict(after.aliases)} if after.aliases else {}
    return told if before.head() == head else told | {"head": head.decode()}, digest


def one_header(after: NamedArrays) -> bytes:
    """The header of a checkpoint as one safetensors file; tied tensors are in it under each name."""
    own = {name: after.slots[after.aliases.get(name, name)] for name in (*after.names, *after.aliases)}
    order = sorted(own.items(), key=lambda item: -item[1].dtype.itemsize)  # each lies where it is aligned
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


class Given(NamedTuple):
    """An array of NEW before it is told."""

    array: Tensor
    part: Json  # what the patch says of it in any case
    keep: Tensor | None = None


class Telling:
    """Finds for each array of NEW what tells it shortest."""

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
        self.gone = [name for name in before.names if name not in set(after.names)]

    def part(self, name: str) -> tuple[Json, Iterator[bytes]]:
        """(what the text says of an array, its streams)."""
        if self.after.tersor is not None:
            stored = self.after.leaf(name).stored
            if isinstance(stored, Coded) and stored.digest in self.twins:
                return self.same(name, stored.digest), iter(())
        told = self.given(name)
        digest = digest_array(told.array)
        if digest in self.twins:
            return told.part | self.same(name, digest), iter(())
        base, found = self.nearest(name, told)
        return told.part | found, tell(told.array, base, told.keep)

    def same(self, name: str, digest: str) -> Json:
        twin = self.twins[digest]
        return {"how": SAME} | ({} if twin == name else {"of": twin})

    def given(self, name: str) -> Given:
        """An array of NEW; a coded leaf as what it means, if it can be coded to the same bytes again."""
        if self.after.tersor is None:
            return Given(self.after.array(name), {})
        leaf = self.after.leaf(name)
        if not isinstance(leaf.stored, Coded):
            return Given(leaf.array, {})
        keep = self.after.array(leaf.keep) if leaf.keep else None
        profile = "" if leaf.keep == "" else wrote(leaf.stored, leaf.array, keep)
        if not profile:
            return Given(leaf.stored.data, {})
        return Given(leaf.array, {"coder": profile} | ({"keep": leaf.keep} if leaf.keep else {}), keep)

    def nearest(self, name: str, told: Given) -> tuple[Tensor | None, Json]:
        """(the array that tells it shortest, how to find that)."""
        best: tuple[Tensor | None, Json] = (None, {"how": ALONE})
        least = cost(told, None)
        for other in self.candidates(name, told.array):
            found = fitted(self.before.array(other), tuple(told.array.shape), told.array.dtype)
            if found is None:
                continue
            named = {} if other == name else {"of": other}
            for base, more in ((found, named), *self.moved(name, other, found, named)):
                price = cost(told, base)
                if price < least:
                    least, best = price, (base, more)
        return best

    def candidates(self, name: str, array: Tensor) -> list[str]:
        """The array of this name, else some that only OLD has: one of them may have been renamed."""
        if name in self.kinds:
            return [name]
        kind = array.dtype, tuple(array.shape)
        return [other for other in self.gone if self.kinds[other] == kind][:MOST]

    def moved(self, name: str, other: str, found: Tensor, named: Json) -> Iterator[tuple[Tensor, Json]]:
        """Old codes rounded to the new grid, where both are codes of grids."""
        if self.before.tersor is None or self.after.tersor is None:
            return
        old, new = self.before.leaf(other).grid, self.after.leaf(name).grid
        if old is not None and new is not None and movable(found, old, new):
            yield regrid(found, old, new), named | {"grid": True}


def digest_array(array: Tensor) -> str:
    sha = hashlib.sha256(f"{array.dtype} {tuple(array.shape)} ".encode())
    sha.update(as_bytes(array).data)
    return sha.hexdigest()


def cost(told: Given, base: Tensor | None) -> int:
    """Bytes that a sample of rows takes with this base, about."""
    array, _, keep = told
    step = max(1, array.numel() // SAMPLE)
    if step > 1 and array.ndim and array.shape[0] > step:
        array = array[::step].contiguous()
        base = None if base is None else base[::step].contiguous()
        keep = None if keep is None else keep[::step].contiguous()
    return sum(map(len, tell(array, base, keep, "fast")))


def wrote(stored: Coded, array: Tensor, keep: Tensor | None) -> str:
    """The profile that codes the array to the very bytes that are stored; empty where none does."""
    for profile in dict.fromkeys((stored.coder, *PROFILES)):
        if coded(array, keep, profile).replace(coder=stored.coder).digest == stored.digest:
            return profile
    return ""


def write_patch(file: BinaryIO, told: Finished, before: NamedArrays) -> int:
    """The text and the streams as a safetensors file; returns its bytes."""
    text, streams = deflate(told.text, head=before.head()), told.streams
    metadata = {
        PATCH: str(NUMBER), "old": before.digest(), "new": told.new, "size": str(len(told.text)),
        "crc": f"{zlib.crc32(told.text):08x}{streams.crc:08x}",
    }  # fmt: skip
    sizes = {TEXT: len(text), STREAMS: streams.nbytes}
    header = build_header([(name, torch.uint8, (n,), n) for name, n in sizes.items()], metadata)
    file.write(header + text)
    for begin in range(0, streams.nbytes, CHUNK):
        file.write(streams.read(begin, min(begin + CHUNK, streams.nbytes)))
    return len(header) + len(text) + streams.nbytes
