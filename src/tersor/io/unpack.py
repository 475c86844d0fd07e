"""Unpack: decode a .tersor file to .safetensors: one file, or shards with an index as in Hugging Face.

For each site: read it, decode it, write it under its old name; several at a time, on all cores. The text has
all shapes, so the header is written first, and each slice is written to its place as soon as it is decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from torch import Tensor

from tersor.errors import SettingError, SiteError, did_you_mean
from tersor.files import atomic, atomic_folder, output, write_text
from tersor.forms.form import as_bytes
from tersor.io.container import TersorFile
from tersor.io.header import build_header
from tersor.record.observer import Observer

OTHERS = (".pt", ".pth", ".bin", ".ckpt", ".onnx", ".tersor")
METADATA = {"format": "pt"}  # required by transformers
UNITS = ("", "k", "M", "G", "T")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """The tensors of one file: names (the site's, then its aliases) by site."""

    names: dict[str, list[str]]
    nbytes: int


def unpack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    only: str | Sequence[str] = "*",
    shard: int | str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    observer: Observer | None = None,
) -> int:
    """Write the decoded tensors of a .tersor file as .safetensors, with the original names and dtypes.
    Returns the bytes written.

    `only`: a glob, or several, that select tensors; the others are not read. `shard`: `out` is a new folder
    of files with at most this many bytes of tensors (a number, or "2GB") and an index. FormatError if a part
    of the file is damaged; nothing is written then. `limit` as in load().
    """
    out, observer = Path(out), observer or Observer()
    size = None if shard is None else read_size(shard)
    with TersorFile(path, limit=limit) as file:
        chosen = select(file, only)
        if only == "*":  # unpacking all of a file checks all of it
            file.check_rest()
        if size is None and out.suffix in OTHERS:
            raise SettingError(
                f"unpack: writes safetensors, so name it {out.stem}.safetensors, not {out.name}"
            )
        if size is None:
            output(out, [path])
        parts = parts_of(file, chosen, size)
        unpacking = Unpacking(file, parts, workers, observer)
        if size is None:
            with atomic(out) as target:
                return unpacking.write(parts[0], target)
        with atomic_folder(out) as folder:
            return write_shards(unpacking, parts, folder)


def read_size(text: int | str) -> int:
    """Bytes from a number or a text such as 500MB, 2GB or 1GiB."""
    found = re.fullmatch(r"(\d{1,15})\s*([kMGT]?)(i?)B?", str(text))
    nbytes = int(found[1]) * (1024 if found[3] else 1000) ** UNITS.index(found[2]) if found else 0
    if nbytes < 1:
        raise SettingError(f"unpack: shard={text}, but it is a number of bytes: 2000000000, 500MB, 2GB, 1GiB")
    return nbytes


def select(file: TersorFile, only: str | Sequence[str]) -> dict[str, list[str]]:
    """Names to write, by the site that holds them. SiteError for a glob that matches none."""
    globs = [only] if isinstance(only, str) else list(only)
    known = [*file.sites, *file.aliases]
    for glob in globs:
        if known and not any(fnmatchcase(name, glob) for name in known):
            raise SiteError(f"{file.path}: no tensor is called {glob!r}; {did_you_mean(glob, known)}")
    held: dict[str, list[str]] = {}
    for name in known:
        if any(fnmatchcase(name, glob) for glob in globs):
            held.setdefault(file.aliases.get(name, name), []).append(name)
    return held


def parts_of(file: TersorFile, chosen: dict[str, list[str]], shard: int | None) -> list[Shard]:
    """The tensors of each file, in the model's order. A tensor larger than `shard` gets its own file."""
    parts = [Shard({}, 0)]
    for site, names in chosen.items():
        nbytes = len(names) * file.nbytes(site)
        if shard is not None and parts[-1].names and parts[-1].nbytes + nbytes > shard:
            parts.append(Shard({}, 0))
        parts[-1] = Shard(parts[-1].names | {site: names}, parts[-1].nbytes + nbytes)
    for number, part in enumerate(parts):  # wide elements first, so that all are aligned
        order = sorted(part.names, key=lambda site: -file.sites[site].torch_dtype.itemsize)
        parts[number] = Shard({site: part.names[site] for site in order}, part.nbytes)
    return parts


class Unpacking:
    """Writes parts one after the other; each slice to its place as soon as it is decoded."""

    def __init__(self, file: TersorFile, parts: list[Shard], workers: int | None, observer: Observer) -> None:
        self.file, self.workers, self.observer, self.done = file, workers, observer, 0
        self.total = sum(len(part.names) for part in parts)

    def write(self, part: Shard, target: BinaryIO) -> int:
        """One safetensors file. Returns its bytes."""
        entries = [
            (name, self.file.sites[site].torch_dtype, self.file.shape(site), self.file.nbytes(site))
            for site, names in part.names.items()
            for name in names
        ]
        header = build_header(entries, METADATA)
        target.write(header)
        places, at = {}, len(header)
        for site, names in part.names.items():
            places[site] = at
            at += len(names) * self.file.nbytes(site)
        lock = Lock()

        def put(site: str, slices: Iterator[Tensor]) -> None:
            place, nbytes = places[site], self.file.nbytes(site)
            for piece in slices:
                data = as_bytes(piece)
                with lock:
                    for number in range(len(part.names[site])):
                        target.seek(place + number * nbytes)
                        target.write(data.data)
                place += len(data)

        for site, _, _ in self.file.decoded(part.names, put, self.workers):
            self.done += 1
            self.observer.progress(self.done, self.total, site)
        target.seek(0, os.SEEK_END)
        return len(header) + part.nbytes


def write_shards(unpacking: Unpacking, parts: list[Shard], folder: Path) -> int:
    """Write the parts and the index, with the names that Hugging Face uses. Returns the bytes written."""
    where: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        shard = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        name = f"model{shard}.safetensors"
        with atomic(folder / name) as target:
            total += unpacking.write(part, target)
        where |= {tensor: name for names in part.names.values() for tensor in names}
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(part.nbytes for part in parts)}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_text(folder / INDEX, text)
        total += len(text.encode())
    return total
