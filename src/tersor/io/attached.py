"""Attached: the files that a .tersor file carries beside the weights, and how a folder is made again.

NAME                      a file of the packed folder: configuration, tokenizer, licence
.tersor/files.json        the folder's weights files: name, metadata of the .safetensors, names of tensors
.tersor/versions.json     unusual versions of modules (model/versions.py)
docs/format.md section 4. The last two exist only if they say more than a reader assumes. No other name with
a hidden part is written to a folder: what is in .git/config, say, is run by other programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tersor.errors import FormatError
from tersor.io.checkpoint import Checkpoint
from tersor.io.folder import INDEX, LARGEST, SUFFIX, folded, plain_name, renamed
from tersor.io.json_text import Json, dump, of_type, only, parse
from tersor.io.safetensors_file import cannot_read
from tersor.model.versions import VERSIONS, Version, is_version, unusual

OURS = ".tersor/"
FILES = f"{OURS}files.json"
METADATA = {"format": "pt"}  # of a .safetensors without another; required by transformers
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class WeightsFile:
    """One .safetensors file to write."""

    name: str = SINGLE
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)
    tensors: tuple[str, ...] | None = None  # None: all that no other file has


@dataclass(frozen=True)
class Layout:
    """The weights files of a folder, and the name of their index; "" if it had none."""

    files: tuple[WeightsFile, ...] = (WeightsFile(),)
    index: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' metadata agrees on."""
        every: dict[str, set[str]] = {}
        for file in self.files:
            for key, value in file.metadata.items():
                every.setdefault(key, set()).add(value)
        return {key: min(values) for key, values in every.items() if len(values) == 1}


def attachments_of(source: Checkpoint) -> dict[str, bytes]:
    """The files that go along with a checkpoint, by name. StorageError if one cannot be read."""
    along = source.folder.along if source.folder else {}
    return {name: read_along(path) for name, path in along.items()} | notes_of(source)


def read_along(path: Path) -> bytes:
    """The bytes of a file that goes along. StorageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise cannot_read(path, error) from None
    if len(data) > LARGEST:
        raise FormatError(f"{path}: it grew beyond {LARGEST:,} bytes while the folder was read")
    return data


def notes_of(source: Checkpoint) -> dict[str, bytes]:
    """The attachments that state how a checkpoint was stored, if that is unusual."""
    layout, index = [], source.folder.index if source.folder else None
    for file in source.folder.read if source.folder else ():
        if not plain_name(file.name):
            raise FormatError(
                f"{file}: a folder cannot have a file of this name on every system; rename it, or give the "
                "file in place of its folder"
            )
    for part in source.files:
        name = renamed(part.name) if source.folder else SINGLE
        entry: Json = {} if name == SINGLE else {"name": name}
        entry |= {"metadata": dict(part.metadata)} if part.metadata not in ({}, METADATA) else {}
        layout.append(entry | ({"tensors": list(part.names)} if len(source.files) > 1 else {}))
    names = Counter(folded(str(entry.get("name", SINGLE))) for entry in layout)
    if double := [name for name, count in names.items() if count > 1]:
        raise FormatError(
            f"{double[0]!r}: two files of the folder would have this name, where capitals do not count and "
            ".bin files become .safetensors. Rename one"
        )
    document: Json = {"files": layout} if layout not in ([], [{}]) else {}
    document |= {"index": renamed(index.name)} if document and index else {}
    known = {*source.slots, *source.aliases}
    stated = unusual(source.versions or {}, known)
    return ({FILES: dump(document)} if document else {}) | ({VERSIONS: dump(stated)} if stated else {})


def layout_from(data: bytes | None) -> Layout:
    """The layout that an attachment states. FormatError if it is not one, or names a file elsewhere."""
    if data is None:
        return Layout()
    who = f"attachments: {FILES}"
    document = of_type(parse(data, who), dict, who)
    only(document, ("files", "index"), who)
    files = tuple(weights_file(entry, who) for entry in of_type(document.get("files"), list, f"{who}: files"))
    index = of_type(document.get("index", ""), str, f"{who}: index")
    names = [folded(file.name) for file in files]
    if not files or len(set(names)) < len(names):
        raise FormatError(f"{who} lists no file, or one of them twice")
    if index and (not plain_name(index) or not index.endswith(INDEX)):
        raise FormatError(f"{who} has the index {index[:60]!r}, which is no name of an index")
    return Layout(files, index)


def weights_file(entry: Any, who: str) -> WeightsFile:
    only(of_type(entry, dict, f"{who}: a file"), ("name", "metadata", "tensors"), f"{who}: a file")
    name = of_type(entry.get("name", SINGLE), str, f"{who}: a name")
    if not plain_name(name) or not name.endswith(SUFFIX):
        raise FormatError(f"{who} has the name {name[:60]!r}, which is no name of a {SUFFIX} file")
    metadata = of_type(entry.get("metadata", METADATA), dict, f"{who}: metadata")
    tensors = entry.get("tensors")
    words = [*metadata.values(), *(of_type(tensors, list, f"{who}: tensors") if tensors is not None else ())]
    if not all(type(word) is str for word in words):
        raise FormatError(f"{who}: metadata and tensors must be strings")
    return WeightsFile(name, metadata, None if tensors is None else tuple(tensors))


def versions_from(data: bytes) -> dict[str, Version]:
    """Versions of modules. FormatError if the attachment does not state them."""
    who = f"attachments: {VERSIONS}"
    found: dict[str, Version] = of_type(parse(data, who), dict, who)
    if not all(map(is_version, found.values())):
        raise FormatError(f"{who} must map modules to whole numbers or short texts")
    return found


def check_notes(name: str, data: bytes) -> None:
    """FormatError if an attachment of our own does not say what it should."""
    if name == FILES:
        layout_from(data)
    elif name == VERSIONS:
        versions_from(data)


def to_write(names: Iterable[str], weights: Iterable[str]) -> list[str]:
    """The attachments that are files of a folder, their names checked; `weights`: files written too."""
    found = [name for name in names if not name.startswith(OURS)]
    check_names(found, weights, "attachments", "Read it: tersor.load(FILE).attachments[NAME]")
    return found


def check_names(names: Iterable[str], weights: Iterable[str], who: str, remedy: str = "") -> None:
    """FormatError if a part of a name is hidden or no name of a file, or if two files of a folder would have
    one name; `weights`: files at its top."""
    taken: set[str] = set()
    folders: set[str] = set()
    end = f". {remedy}" if remedy else ""
    for name, parts in chain(((n, [n]) for n in weights), ((n, n.split("/")) for n in names)):
        if not all(map(plain_name, parts)):
            raise FormatError(
                f"{who}: {name[:100]!r} is not written to a folder: a part of it is hidden, too long or no "
                f"file name on every system{end}"
            )
        key = folded(name)
        if key in taken:
            raise FormatError(
                f"{who}: {name[:100]!r} and another file of the folder would have one name{end}"
            )
        taken.add(key)
        folders |= {key[:at] for at, letter in enumerate(key) if letter == "/"}
    if double := taken & folders:
        raise FormatError(f"{who}: {min(double)[:100]!r} would be a file and a folder{end}")


def put(folder: Path, name: str, data: bytes) -> None:
    """Write an attachment to a folder that is not in place yet."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:  # a file system may take two names for one that check_names does not
        file.write(data)
