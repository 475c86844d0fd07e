"""Patch: write NEW, a file or a folder, from OLD and a patch of io/patch/diff.py. docs/format.md section 12.

cost    decode OLD, code the changed leaves of a .tersor file again, write NEW
A wrong OLD is refused by its digest. NEW is put in place only if its digest is the one in the patch.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tersor.dtypes import NAMED
from tersor.errors import FormatError, RefusedError, SettingError
from tersor.files import atomic, atomic_folder, output
from tersor.forms import FORMS, NODES, Grid
from tersor.io.attached import SUFFIX
from tersor.io.container import TEXT as OWN
from tersor.io.container import TersorFile
from tersor.io.container_writer import Builder
from tersor.io.document import (
    ATTACHMENT,
    TINY,
    aliases_from_json,
    attachments_from_json,
    changes_from_json,
    edges_from_json,
    indices_from_json,
    shape_of,
    site_from_json,
)
from tersor.io.document import KEYS as DOCUMENT
from tersor.io.folder import inputs_of
from tersor.io.form_json import Places
from tersor.io.header import Slot, check_shape, natural
from tersor.io.json_text import inflate, of_type, only, parse
from tersor.io.ledger_json import ledger_from_json
from tersor.io.patch.folders import FOLDER, FolderTarget, Hashing, write_folder, write_tensors
from tersor.io.patch.named_arrays import PATCH, NamedArrays
from tersor.io.patch.patch_reader import PatchReader, SiteLeaves
from tersor.io.safetensors_file import CHUNK, TensorFile, TensorWriter
from tersor.io.short_header import Source
from tersor.io.unpack import OTHERS
from tersor.record.node_json import unflatten
from tersor.record.observer import Observer

NUMBER = 1
TEXT, STREAMS = "patch", "streams"  # the two tensors of a patch
FILE = "file"  # the kind of a patch that carries NEW as it is
KEYS = ("kind", "tiny", "text", "large", "head", "aliases", "files", "others", "whole", "parts")


def patch(
    old: str | os.PathLike[str],
    changes: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    observer: Observer | None = None,
) -> int:
    """Write the later file or folder, byte for byte, and return its number of bytes.

    A folder must be new or empty. RefusedError if the patch was made for another OLD, FormatError if the
    patch is damaged.
    """
    with NamedArrays(old) as before, Source(changes) as file, naming(file.path, before.path):
        check_base(file, before)
        reader = open_patch(file, before)
        with target_of(reader, out, [*inputs_of(old), changes]) as target:
            nbytes = write(reader, target, Path(out).parent, observer or Observer())
            if target.sha.hexdigest() != file.metadata["new"]:
                raise FormatError(
                    "the file that it makes has a wrong SHA-256. The patch is damaged, or another version of "
                    "tersor made it: use that version"
                )
        return nbytes


@contextmanager
def target_of(
    reader: PatchReader, out: str | os.PathLike[str], inputs: list[Any]
) -> Iterator[Hashing | FolderTarget]:
    """What the patch writes to: a file, or a folder that does not exist yet."""
    if reader.text.get("kind") != FOLDER:
        with atomic(output(out, inputs)) as file:
            yield Hashing(file)
        return
    if Path(out).suffix in (SUFFIX, *OTHERS):
        raise SettingError(f"patch: it makes a folder, so name one: {Path(out).stem}/, not {Path(out).name}")
    with atomic_folder(out) as folder:
        yield FolderTarget(folder)


@contextmanager
def naming(path: Path, old: Path) -> Iterator[None]:
    """Put the patch's path before the message of a FormatError, unless it has a path."""
    try:
        yield
    except FormatError as error:
        message = str(error)
        known = message.startswith((str(path), str(old)))
        raise FormatError(message if known else f"{path}: {message}") from None


def check_base(file: TensorFile, before: NamedArrays) -> None:
    """Refuse a file that is not a patch, and an OLD that the patch was not made for."""
    number = file.metadata.get(PATCH)
    if number is None:
        raise FormatError("it is not a patch. Make one: tersor diff OLD NEW -o PATCH")
    if number != str(NUMBER):
        raise FormatError(
            f"it has format {number[:20]}; this version reads {NUMBER}. A newer tersor may read it"
        )
    for key in ("old", "new"):
        if not re.fullmatch("[0-9a-f]{64}", file.metadata.get(key, "")):
            raise FormatError(f"its metadata has no SHA-256 {key!r}: it is damaged")
    digest, wanted = before.digest, file.metadata["old"]
    if digest != wanted and digest == file.metadata["new"]:
        if not before.folder:
            raise RefusedError(f"{before.path}: {file.path} makes this very file: there is nothing to do")
        # The digest of a folder says nothing about the files beside its weights, such as its configuration.
        raise RefusedError(
            f"{before.path}: {file.path} makes weights that this folder has already. For the files beside "
            "them, give the OLD that diff was given"
        )
    if digest != wanted:
        raise RefusedError(
            f"{before.path}: {file.path} was made for another file: the SHA-256 of this one is "
            f"{digest[:12]}..., the other has {wanted[:12]}... Give the OLD that diff was given"
        )


def open_patch(file: TensorFile, before: NamedArrays) -> PatchReader:
    """A reader of the patch, after its checksums are compared."""
    slots, metadata = file.slots, file.metadata
    if slots.keys() != {TEXT, STREAMS} or any(slots[name].dtype != NAMED["uint8"] for name in slots):
        raise FormatError(f"it must have the tensors {TEXT!r} and {STREAMS!r} of U8: it is damaged")
    text, streams = slots[TEXT], slots[STREAMS]
    size = natural(metadata.get("size", ""))
    if size is None:
        raise FormatError("its metadata does not state the size of its text: it is damaged")
    raw, rest = inflate(file.bytes(text.begin, text.end), size, before.head())
    if rest:
        raise FormatError("it is damaged: there are bytes after its text")
    crc = 0
    for begin in range(streams.begin, streams.end, CHUNK):
        crc = zlib.crc32(file.bytes(begin, min(begin + CHUNK, streams.end)), crc)
    if metadata.get("crc") != f"{zlib.crc32(raw):08x}{crc:08x}":
        raise FormatError("it is damaged: the CRC of its bytes is not the one in its metadata")

    def read(begin: int, end: int) -> bytes:
        return file.bytes(streams.begin + begin, streams.begin + end)

    return PatchReader(of_type(parse(raw, "its text"), dict, "its text"), read, streams.nbytes, before)


def write(reader: PatchReader, target: Any, folder: Path, observer: Observer) -> int:
    """Write the new file. Returns its size in bytes."""
    only(reader.text, KEYS, "its text")
    kind = of_type(reader.text.get("kind"), str, "its kind")
    if kind not in WRITERS:
        raise FormatError(f"its kind is {kind[:20]!r}; known are {', '.join(WRITERS)}")
    return WRITERS[kind](reader, target, folder, observer)


def write_tersor(reader: PatchReader, target: Any, folder: Path, observer: Observer) -> int:
    """Write the forms of NEW with the common writer of .tersor files."""
    document = of_type(text_or_old(reader, "text"), dict, "its text of the new file")
    tiny = of_type(reader.text.get("tiny", False), bool, "tiny")
    only(document, TINY if tiny else DOCUMENT, "its text of the new file")
    places, digests, sites, kept, trees = Places(large_leaves(reader)), {}, {}, {}, {}
    indices = indices_from_json(document.get("indices", []), reader.nbytes + reader.before.nbytes)
    for name, entry in of_type(document.get("sites"), dict, "sites").items():
        site, digests[name], tree, kept[name] = site_from_json(name, entry, indices, tiny=tiny)
        sites[name] = site
        trees[name] = places.full(tree, shape_of(site, kept[name]), site.dtype, name)
    for edge, digests[edge], tree in edges_from_json(document.get("grids", {}), sites, tiny=tiny):
        trees[edge] = places.grid(tree, edge)
    attached = attachments_from_json(document.get("attachments", {}), places.slots)
    with TensorWriter(folder) as tensors:
        builder = Builder(tensors, tiny=tiny)
        for number, (name, tree) in enumerate(trees.items(), 1):
            stored = SiteLeaves(reader, places, tree, name).stored
            if name in sites:
                builder.add(sites[name], unflatten(tree, name, stored, FORMS), kept[name])
            else:
                builder.grid(name, cast(Grid, unflatten(tree, name, stored, NODES)))
            observer.progress(number, len(trees), name)
        for name, entry in attached.items():
            full = f"{ATTACHMENT}{name}"
            size = entry["nbytes"] if entry.get("deflated", False) else None
            data = reader.attachment(full, *places.slots[full].shape, size=size)
            builder.attach_stored(name, entry, data)
        ledger = ledger_from_json(document, digests)
        aliases = aliases_from_json(document.get("aliases", {}), sites)
        changes = changes_from_json(document.get("changes", []))
        return builder.finish(target, aliases, ledger, changes=changes)


def large_of(file: TersorFile) -> dict[str, Any]:
    """[dtype, shape] of the leaves that are separate tensors, and of the attachments, by name."""
    slots = {name: slot for name, slot in file.source.slots.items() if name != OWN}
    return {n: [str(s.dtype).removeprefix("torch."), list(s.shape)] for n, s in slots.items()}


def large_leaves(reader: PatchReader) -> dict[str, Slot]:
    """The leaves and attachments of the new file that are separate tensors."""
    old, found = reader.before.tersor, {}
    entries = reader.text.get("large", {} if old is None else large_of(old))
    for name, entry in of_type(entries, dict, "large").items():
        word, lengths = (entry + [0, 0])[:2] if isinstance(entry, list) else ("", 0)
        shape = check_shape(lengths, f"{name[:200]}: shape")
        if not isinstance(word, str) or word not in NAMED:
            raise FormatError(f"{name[:200]}: dtype {str(word)[:40]!r} is not known")
        found[name] = Slot(NAMED[word], shape, 0, math.prod(shape) * NAMED[word].itemsize)
    return found


def write_safetensors(reader: PatchReader, target: Any, folder: Path, observer: Observer) -> int:
    """Write the header of NEW and its tensors in that order."""
    head = of_type(text_or_old(reader, "head"), str, "its header of the new file").encode()
    aliases = of_type(reader.text.get("aliases", {}), dict, "aliases")
    return write_tensors(reader, head, aliases, target, observer)


def write_file(reader: PatchReader, target: Any, folder: Path, observer: Observer) -> int:
    """Write NEW, which the patch carries as it is."""
    for begin in range(0, reader.nbytes, CHUNK):
        target.write(reader.read(begin, min(begin + CHUNK, reader.nbytes)))
        observer.progress(min(begin + CHUNK, reader.nbytes), reader.nbytes)
    return reader.nbytes


def text_or_old(reader: PatchReader, key: str) -> Any:
    """The text or header ("head") of NEW; that of OLD if the patch leaves it out."""
    if key in reader.text:
        return reader.text[key]
    head = reader.before.head()
    return head.decode() if key == "head" else parse(head, "the text of the old file")


WRITERS: dict[str, Callable[[PatchReader, Any, Path, Observer], int]] = {
    "tersor": write_tersor, "safetensors": write_safetensors, FOLDER: write_folder, FILE: write_file,
}  # fmt: skip
