"""Folders: a patch that makes a folder: its .safetensors, their index, and the files that go along.

files     name -> header of a .safetensors; its tensors are arrays of the patch
others    name -> length and SHA-256; their bytes are the arrays attachment:NAME
whole     the streams are all these files as they are, since nothing else was shorter
docs/format.md section 12, "Folders". All names are checked before anything is written.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from tersor.errors import FormatError
from tersor.forms.form import as_bytes
from tersor.io.attached import check_names, put
from tersor.io.document import ATTACHMENT
from tersor.io.folder import LARGEST
from tersor.io.header import Slot, parse_header
from tersor.io.json_text import Json, of_type, only, parse
from tersor.io.patch.named_arrays import NamedArrays, header_of
from tersor.io.patch.patch_reader import PatchReader
from tersor.io.safetensors_file import CHUNK
from tersor.record.observer import Observer

FOLDER = "folder"  # the kind of a patch that makes a folder


class Hashing(io.RawIOBase):
    """A file to write to: computes the SHA-256 and passes the bytes on to `target`, if there is one."""

    def __init__(self, target: BinaryIO | None = None, sha: Any = None) -> None:
        self.sha, self.target = sha or hashlib.sha256(), target

    def write(self, data: Any) -> int:
        self.sha.update(data)
        return len(data) if self.target is None else self.target.write(data)


class FolderTarget:
    """A folder to write to, if there is one: computes the SHA-256 of the files of weights."""

    def __init__(self, into: Path | None = None) -> None:
        self.into, self.sha = into, hashlib.sha256()

    @contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[Hashing]:
        """A new file of weights. They come in the order of their names."""
        self.sha.update(f"{name}\0{nbytes}\0".encode())
        with nullcontext() if self.into is None else open(self.into / name, "xb") as target:
            yield Hashing(target, self.sha)

    def put(self, name: str, data: bytes) -> None:
        """Another file."""
        if self.into is not None:
            put(self.into, name, data)


def folder_facts(before: NamedArrays, after: NamedArrays) -> Json:
    """The entries of a patch about a folder. A header that OLD has too is left out.
    FormatError for a name that `patch` would refuse."""
    headers = {path.name: header_of(path) for path in after.files}
    others = {}
    for name in after.beside:
        data = after.text(f"{ATTACHMENT}{name}") or b""
        others[name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    check_names(others, headers, str(after.path), "Rename it, or give the file in place of its folder")
    return {
        "kind": FOLDER,
        "files": {n: "" if old_header(before, n) == head else head.decode() for n, head in headers.items()},
        "others": others,
    }


def old_header(before: NamedArrays, name: str) -> bytes:
    """The header of OLD's file of this name. Of one .safetensors its header: it may have been renamed, as
    its name is no part of its digest. b"" if there is none."""
    if before.tersor is not None:
        return b""
    return before.head() or next((header_of(file) for file in before.files if file.name == name), b"")


def whole_facts(after: NamedArrays) -> tuple[Json, Iterator[bytes]]:
    """(the text of a patch that carries a folder as it is, the bytes of its files)."""
    files = {path.name: path.stat().st_size for path in after.files}
    text = folder_facts(after, after) | {"files": files, "whole": True, "parts": {}}
    return text, chain.from_iterable(map(chunks, (*after.files, *after.beside.values())))


def chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def write_folder(reader: PatchReader, target: FolderTarget, folder: Path, observer: Observer) -> int:
    """Write the files of weights in the order of their names, then the others."""
    files = dict(sorted(of_type(reader.text.get("files"), dict, "files").items()))
    others = others_from_json(reader.text.get("others", {}))
    check_names(others, files, "the files that it makes")
    whole = of_type(reader.text.get("whole", False), bool, "whole")
    source: Arrays | Whole = Whole(reader, files, others) if whole else Arrays(reader)
    total, number, written = len(files) + len(others), 0, 0
    for number, (name, entry) in enumerate(files.items(), 1):
        written += source.file(name, entry, target)
        observer.progress(number, total, name)
    for more, (name, entry) in enumerate(others.items(), number + 1):
        data = source.other(name, entry["nbytes"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise FormatError(
                f"{name[:100]}: the file that it makes has a wrong SHA-256: the file of this name in "
                f"{reader.before.path} is not the one that diff was given, or the patch is damaged"
            )
        target.put(name, data)
        observer.progress(more, total, name)
        written += len(data)
    return written


class Arrays:
    """The files of a folder from the arrays of a patch."""

    def __init__(self, reader: PatchReader) -> None:
        self.reader = reader
        self.aliases = of_type(reader.text.get("aliases", {}), dict, "aliases")

    def file(self, name: str, entry: Any, target: FolderTarget) -> int:
        """Write a file of weights, from its header, or "" for that in OLD."""
        head = of_type(entry, str, f"files: {name[:100]}").encode() or old_header(self.reader.before, name)
        if not head:
            raise FormatError(f"files: {name[:100]!r} has no header, and the old folder has no such file")
        with target.file(name, size_of_file(head)) as file:
            return write_tensors(self.reader, head, self.aliases, file)

    def other(self, name: str, nbytes: int) -> bytes:
        return as_bytes(self.reader.attachment(f"{ATTACHMENT}{name}", nbytes)).tobytes()


class Whole:
    """The files of a folder as they are in the streams."""

    def __init__(self, reader: PatchReader, files: Json, others: Json) -> None:
        self.reader, self.at = reader, 0
        sizes = [of_type(entry, int, f"files: {name[:100]}") for name, entry in files.items()]
        sizes += [entry["nbytes"] for entry in others.values()]
        if min(sizes, default=0) < 0 or sum(sizes) != reader.nbytes:
            raise FormatError(
                f"its streams have {reader.nbytes:,} bytes, but not those of the files that it carries"
            )

    def file(self, name: str, nbytes: int, target: FolderTarget) -> int:
        """Write a file of weights, from its number of bytes."""
        with target.file(name, nbytes) as file:
            for begin in range(0, nbytes, CHUNK):
                file.write(self.take(min(CHUNK, nbytes - begin)))
        return nbytes

    def other(self, name: str, nbytes: int) -> bytes:
        return self.take(nbytes)

    def take(self, nbytes: int) -> bytes:
        begin, self.at = self.at, self.at + nbytes
        return self.reader.read(begin, self.at)


def others_from_json(entries: Any) -> dict[str, Json]:
    for name, entry in of_type(entries, dict, "others").items():
        who = f"others: {name[:100]}"
        only(of_type(entry, dict, who), ("nbytes", "sha256"), who)
        of_type(entry.get("sha256"), str, f"{who}: sha256")
        if not 0 <= of_type(entry.get("nbytes"), int, f"{who}: nbytes") <= LARGEST:
            raise FormatError(f"{who} states {entry['nbytes']:,} bytes, of at most {LARGEST:,}")
    return dict(entries)


def write_tensors(
    reader: PatchReader, head: bytes, aliases: Json, target: Any, observer: Observer | None = None
) -> int:
    """Write a safetensors file: the header, then its tensors in that order. Returns its size in bytes."""
    target.write(len(head).to_bytes(8, "little") + head)
    slots = slots_of(head)
    ordered = in_order(slots)
    for number, name in enumerate(ordered, 1):
        slot, own = slots[name], of_type(aliases.get(name, name), str, "aliases")
        target.write(as_bytes(reader.array(own, slot.dtype, slot.shape)).data)
        if observer is not None:
            observer.progress(number, len(ordered), name)
    return size_of_file(head)


def size_of_file(head: bytes) -> int:
    """Bytes of a safetensors file with this header."""
    return 8 + len(head) + sum(slot.nbytes for slot in slots_of(head).values())


def slots_of(head: bytes) -> dict[str, Slot]:
    """The tensors of a safetensors file, from its header alone."""
    sizes = of_type(parse(head, "its header of the new file"), dict, "its header of the new file")
    ends = [0]
    for entry in sizes.values():
        if isinstance(entry, dict) and isinstance(offsets := entry.get("data_offsets"), list):
            ends += [n for n in offsets if type(n) is int]
    return parse_header(head, max(ends))[0]


def in_order(slots: dict[str, Slot]) -> list[str]:
    """Names in the order of their bytes."""
    return sorted(slots, key=lambda name: (slots[name].begin, slots[name].end))
