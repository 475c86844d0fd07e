"""Unpack: decode a .tersor file to .safetensors: one file, or a folder with the files that go with it.

A folder has the weights files that were packed, or shards of a given size with an index as in Hugging Face.
For each site: read it, decode it, write it under its old name; several at a time, on all cores. The text has
all shapes, so the header is written first, and each slice is written to its place as soon as it is decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from torch import Tensor

from tersor.errors import RefusedError, SettingError, SiteError, did_you_mean, few
from tersor.files import atomic, atomic_folder, output, write_text
from tersor.forms.form import as_bytes
from tersor.io.attached import FILES, METADATA, OURS, SINGLE, SUFFIX, Layout, layout_from, put, to_write
from tersor.io.container import TersorFile
from tersor.io.folder import INDEX
from tersor.io.header import build_header
from tersor.io.other_network import CONFIG, replaced
from tersor.record.observer import Observer

OTHERS = (".pt", ".pth", ".bin", ".ckpt", ".onnx", ".tersor")
UNITS = ("", "k", "M", "G", "T")


@dataclass(frozen=True)
class Shard:
    """The tensors of one file: names (the site's, then its aliases) by site."""

    names: dict[str, list[str]]
    nbytes: int
    name: str = ""  # of the file, in a folder
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)


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
    """Write the decoded tensors of a .tersor file as .safetensors, with the original names, dtypes and
    metadata. Returns the bytes written.

    `out` is a new folder if it ends with a slash, is an empty folder, or `shard` is given: then the weights
    files of a packed folder have their names again, and configuration and tokenizer are written too. `only`:
    a glob, or several, that select tensors; nothing else is read. `shard`: files with at most this many bytes
    of tensors (a number, or "2GB") and an index. FormatError if a part of the file is damaged, or the name of
    an attachment is unsafe; nothing is written then. `limit` as in load(). RefusedError for a folder from
    which transformers would build another network, because layers were replaced (other_network.py).
    """
    observer = observer or Observer()
    folder = shard is not None or os.fspath(out).endswith(("/", os.sep)) or os.path.isdir(out)
    out, size = Path(out), None if shard is None else read_size(shard)
    with TersorFile(path, limit=limit) as file:
        chosen = select(file, only)
        if only == "*":  # unpacking all of a file checks all of it
            file.check_rest()
        if not folder and out.suffix in OTHERS:
            raise SettingError(
                f"unpack: writes safetensors, so name it {out.stem}.safetensors, not {out.name}"
            )
        if not folder:
            output(out, [path])
        layout = layout_from(file.attachment(FILES) if FILES in file.attachments else None)
        if folder and size is None:
            parts, index = files_of(file, chosen, layout), layout.index
        else:
            parts, index = parts_of(file, chosen, size, layout)
        written = [*(part.name for part in parts), *([index] if index else [])]
        attached = to_write(file.attachments, written) if folder and only == "*" else []
        refuse_other_network(file, attached)
        unpacking = Unpacking(file, parts, workers, observer)
        if not folder:
            with atomic(out) as target:
                nbytes = unpacking.write(parts[0], target)
            if left := [name for name in file.attachments if not name.startswith(OURS)]:
                observer.message(f"not written: {few(left)}. Name a folder to have them too: -o {out.stem}/")
            return nbytes
        with atomic_folder(out) as into:
            nbytes = write_files(unpacking, parts, index, into)
            for name in attached:
                nbytes += len(data := file.attachment(name))
                put(into, name, data)
            return nbytes


def refuse_other_network(file: TersorFile, attached: list[str]) -> None:
    """Refuse a folder whose configuration does not describe the network, if loading it would show no error:
    from_pretrained lists names that are missing or unknown, and runs. Other sizes it refuses itself."""
    if CONFIG in attached and (words := replaced(file.changes)):
        raise RefusedError(
            f"{file.path}: {words}. {CONFIG} describes the network without that, and from_pretrained would "
            f"build that one, with these tensors: another function. Write the tensors alone, -o "
            f"{file.path.stem}.safetensors, or use tersor.load({str(file.path)!r}).model(net)"
        )


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


def parts_of(
    file: TersorFile, chosen: dict[str, list[str]], size: int | None, layout: Layout
) -> tuple[list[Shard], str]:
    """(the tensors of each file in the model's order, the name of the index). A tensor larger than `size`
    gets its own file. Names are those that Hugging Face uses."""
    parts = [Shard({}, 0)]
    for site, names in chosen.items():
        nbytes = len(names) * file.nbytes(site)
        if size is not None and parts[-1].names and parts[-1].nbytes + nbytes > size:
            parts.append(Shard({}, 0))
        parts[-1] = Shard(parts[-1].names | {site: names}, parts[-1].nbytes + nbytes)
    stems = {re.sub(r"-\d+-of-\d+$", "", part.name.removesuffix(SUFFIX)) for part in layout.files}
    stem = stems.pop() if len(stems) == 1 else SINGLE.removesuffix(SUFFIX)
    metadata = layout.metadata or METADATA
    for number, part in enumerate(parts, 1):
        word = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        parts[number - 1] = Shard(aligned(file, part.names), part.nbytes, f"{stem}{word}{SUFFIX}", metadata)
    return parts, f"{stem}{SUFFIX}{INDEX}" if len(parts) > 1 else ""


def files_of(file: TersorFile, chosen: dict[str, list[str]], layout: Layout) -> list[Shard]:
    """The tensors of each weights file of the packed folder. Tensors that the folder did not have, from a
    later run, are in its last file."""
    place = {name: number for number, part in enumerate(layout.files) for name in part.tensors or ()}
    rest = next((n for n, part in enumerate(layout.files) if part.tensors is None), len(layout.files) - 1)
    held: list[dict[str, list[str]]] = [{} for _ in layout.files]
    for site, names in chosen.items():
        for name in names:
            held[place.get(name, rest)].setdefault(site, []).append(name)
    return [
        Shard(
            aligned(file, names), sum(len(every) * file.nbytes(site) for site, every in names.items()),
            part.name, part.metadata,
        )
        for part, names in zip(layout.files, held, strict=True)
        if names or len(layout.files) == 1
    ]  # fmt: skip


def aligned(file: TersorFile, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """The tensors of one file, wide elements first, so that all are aligned."""
    order = sorted(names, key=lambda site: -file.sites[site].torch_dtype.itemsize)
    return {site: names[site] for site in order}


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
        header = build_header(entries, part.metadata)
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


def write_files(unpacking: Unpacking, parts: list[Shard], index: str, folder: Path) -> int:
    """Write the weights files, and their index if it has a name. Returns the bytes written."""
    where: dict[str, str] = {}
    total = 0
    for part in parts:
        with atomic(folder / part.name) as target:
            total += unpacking.write(part, target)
        where |= {tensor: part.name for names in part.names.values() for tensor in names}
    if index:
        document = {"metadata": {"total_size": sum(part.nbytes for part in parts)}, "weight_map": where}
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        write_text(folder / index, text)
        total += len(text.encode())
    return total
