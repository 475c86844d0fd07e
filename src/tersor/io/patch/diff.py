"""Diff: write a patch that makes a later file of weights from an earlier one. docs/format.md section 12.

diff    codes each array of NEW against the OLD array that gives the fewest bytes: same name, else same shape
size    equal arrays cost nothing; a changed code or float costs about the bits of its difference; never more
        than NEW and HEAD bytes, since a patch may also carry NEW as it is; for a folder, names and hashes too
A .tersor file, a .safetensors or a folder of them is restored byte for byte, with the files that go along;
another checkpoint as one .safetensors.
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
from typing import Any, BinaryIO, NamedTuple

import torch

from tersor.errors import FormatError
from tersor.files import atomic, output
from tersor.forms.form import as_bytes
from tersor.io.folder import inputs_of
from tersor.io.header import build_header
from tersor.io.json_text import Json, deflate, dump, parse
from tersor.io.patch.encoder import Encoder
from tersor.io.patch.folders import (
    FolderTarget,
    Hashing,
    folder_facts,
    in_order,
    size_of_file,
    slots_of,
    whole_facts,
)
from tersor.io.patch.named_arrays import PATCH, NamedArrays
from tersor.io.patch.patch import FILE, NUMBER, STREAMS, large_of, write
from tersor.io.patch.patch import TEXT as OWN
from tersor.io.patch.patch_reader import ALONE, CHANGE, SAME, TEXT, PatchReader
from tersor.io.safetensors_file import CHUNK, IN_MEMORY
from tersor.record.observer import Observer

HEAD = 512  # bytes that a patch has at most besides those of NEW


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
    whole: bool = False  # the patch carries NEW as it is: nothing else was shorter


def diff(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    observer: Observer | None = None,
) -> Delta:
    """Write a patch from OLD to NEW; each is a .tersor file or a checkpoint.

    The patch is applied once before it is put in place, to check that it makes NEW. FormatError for a damaged
    file.
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
        carried = stack.enter_context(Spool(folder))
        whole = draft is None or size_of(draft, before) > new_nbytes(after)
        if draft is None or whole:
            other = carried.carry(before, after)
            whole = draft is None or size_of(other, before) < size_of(draft, before)
            draft = other if draft is None or whole else draft
        nbytes = write_patch(file, draft, before)
        hows = [draft.parts.get(name, {"how": SAME}).get("how", CHANGE) for name in after.names]
        same, changed, alone = (
            0 if whole else sum(map(hows.count, kinds)) for kinds in ((SAME,), (CHANGE, TEXT), (ALONE,))
        )
        tensors = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in after.slots.values())
        alone = len(hows) if whole else alone
        return Delta(
            nbytes, same, changed, alone, after.ignored, after.reasons, tensors, after.nbytes, whole
        )  # fmt: skip


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

    def add(self, stream: Any) -> int:
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
        try:
            made = self.applied(text, before, after, SecondHalf(observer))
        except FormatError:  # an encoder of another version made NEW
            return None
        return Draft(text, parts, digest, self) if made == digest else None

    def carry(self, before: NamedArrays, after: NamedArrays) -> Draft:
        """NEW as it is. FormatError if applying the patch does not give it, as after a change of the file."""
        if after.folder:
            facts, pieces = whole_facts(after)
            for piece in pieces:
                self.add(piece)
            digest = after.digest
        else:
            facts, sha = {"kind": FILE, "parts": {}}, hashlib.sha256()
            for piece in bytes_of(after):
                sha.update(piece)
                self.add(piece)
            digest = sha.hexdigest()
        text = dump(facts)
        if self.applied(text, before, after, Observer()) != digest:
            raise FormatError(f"{after.path}: it changed while it was read")
        return Draft(text, {}, digest, self)

    def applied(self, text: bytes, before: NamedArrays, after: NamedArrays, observer: Observer) -> str:
        """The SHA-256 of what the patch makes. FormatError if it cannot be applied."""
        again = FolderTarget() if after.folder else Hashing()
        reader = PatchReader(parse(text, "its text"), self.read, self.nbytes, before)
        write(reader, again, self.folder, observer)
        return again.sha.hexdigest()

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
        return facts, after.digest
    aliases = {"aliases": dict(after.aliases)} if after.aliases else {}
    if after.folder:
        return folder_facts(before, after) | aliases, after.digest
    head = after.head()
    facts, digest = {"kind": "safetensors"} | aliases, after.digest if head else ""
    if not head:
        head = single_header(after)
        digest = digest_of(after, head)
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
    sha = hashlib.sha256()
    for piece in as_one_file(after, head):
        sha.update(piece)
    return sha.hexdigest()


def as_one_file(after: NamedArrays, head: bytes) -> Iterator[Any]:
    """The bytes of a checkpoint's tensors as one safetensors file with this header."""
    yield len(head).to_bytes(8, "little") + head
    for name in in_order(slots_of(head)):
        yield as_bytes(after.array(after.aliases.get(name, name))).data


def bytes_of(after: NamedArrays) -> Iterator[Any]:
    """The bytes of NEW; a checkpoint of another kind or of several files is one safetensors file."""
    if after.tersor is None and not after.head():
        yield from as_one_file(after, single_header(after))
        return
    with open(after.path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def new_nbytes(after: NamedArrays) -> int:
    """The size of the file that bytes_of gives."""
    if after.tersor is not None or after.folder or after.head():
        return after.nbytes
    return size_of_file(single_header(after))


def size_of(draft: Draft, before: NamedArrays) -> int:
    """Bytes of the patch of a draft."""
    header, text = beginning(draft, before)
    return len(header) + len(text) + draft.streams.nbytes


def beginning(draft: Draft, before: NamedArrays) -> tuple[bytes, bytes]:
    """(the header of a patch, its deflated text)."""
    text, streams = deflate(draft.text, head=before.head()), draft.streams
    metadata = {
        PATCH: str(NUMBER), "old": before.digest, "new": draft.new, "size": str(len(draft.text)),
        "crc": f"{zlib.crc32(draft.text):08x}{streams.crc:08x}",
    }  # fmt: skip
    sizes = {OWN: len(text), STREAMS: streams.nbytes}
    return build_header([(name, torch.uint8, (n,), n) for name, n in sizes.items()], metadata), text


def write_patch(file: BinaryIO, draft: Draft, before: NamedArrays) -> int:
    """Write text and streams as a safetensors file. Returns its size in bytes."""
    (header, text), streams = beginning(draft, before), draft.streams
    file.write(header + text)
    for begin in range(0, streams.nbytes, CHUNK):
        file.write(streams.read(begin, min(begin + CHUNK, streams.nbytes)))
    return len(header) + len(text) + streams.nbytes
