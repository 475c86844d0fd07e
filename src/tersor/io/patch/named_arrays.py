"""Named arrays: the common view of .tersor files and checkpoints that diff and patch compare.

The arrays of a .tersor file are its decoded leaves and its attachments as stored; those of a checkpoint are
its tensors; those of a folder of .safetensors are also the files that go along with it. One site or tensor is
in memory at a time.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from tersor.errors import FormatError, SettingError
from tersor.forms import Affine, At, Coded, Dense, Form, uncoded
from tersor.io.attached import read_along
from tersor.io.checkpoint import Checkpoint, SafetensorsCheckpoint
from tersor.io.container import TersorFile
from tersor.io.document import ATTACHMENT
from tersor.io.form_json import leaves
from tersor.io.json_text import dump
from tersor.io.patch.uniform_grids import UniformGrid, table_of
from tersor.io.safetensors_file import CHUNK, TensorFile, bytes_tensor
from tersor.io.short_header import Source

PATCH = "tersor-patch"  # the key in a patch's metadata that holds its format number
ONE = "the patch makes one file, not a folder"  # why the files beside the weights are left out


class StoredLeaf(NamedTuple):
    """A leaf of a .tersor file."""

    stored: Form
    array: Tensor  # decoded
    keep: str | None  # name of the mask's leaf that hides elements; "" if the mask is not one leaf
    grid: UniformGrid | None  # the grid of these codes
    tables: tuple[str, ...] = ()  # names of the leaves of that grid


class NamedArrays:
    """The arrays of a file or folder, by name. FormatError for an unknown file, SettingError for a patch.

    `plain`: read a .tersor file as a plain safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str], *, plain: bool = False) -> None:
        self.path = Path(path)
        self.tersor: TersorFile | None = None
        self.tensors: Checkpoint | TensorFile | None = None
        self.aliases: dict[str, str] = {}
        self.ignored: dict[str, int | None] = {}  # parts of a checkpoint that are left out
        self.reasons: dict[str, str] = {}  # why, of some of them
        self.files = [self.path]
        self.folder = False  # whether a patch makes NEW as a folder
        self.beside: dict[str, Path] = {}  # its files that go along with the weights, and the index
        self.site: tuple[str | None, dict[str, StoredLeaf]] = (None, {})  # the last one that was read
        if plain:
            self.tensors = TensorFile(self.path)
        elif kind_of(self.path) == "tersor":
            self.tersor = TersorFile(self.path)
        elif kind_of(self.path) == PATCH:
            raise SettingError(
                f"{self.path}: it is a patch, but a file of weights is expected here. The order is: "
                "tersor diff OLD NEW -o PATCH, tersor patch OLD PATCH -o NEW"
            )
        else:
            self.tensors = found = Checkpoint(self.path)
            self.ignored, self.reasons = found.ignored, found.reasons
            self.files = sorted(Path(part.path) for part in found.opened)
            self.folder = is_folder(found)
            if found.folder is not None and not self.folder:
                self.reasons = dict.fromkeys(found.folder.along, ONE) | self.reasons
            # A header that is kept has the names with the prefixes of wrappers, which a checkpoint strips.
            kept = self.folder or self.head() != b""
            self.aliases = found.aliases if not kept else {long: name for name, long in found.full.items()}
            self.beside = beside(found) if self.folder else {}
            self.ignored = {name: count for name, count in self.ignored.items() if name not in self.beside}
        self.names = [*self.slots, *(f"{ATTACHMENT}{name}" for name in self.beside)]
        if self.tersor is not None:
            self.names = [
                *self.tersor.places.found,
                *(f"{ATTACHMENT}{name}" for name in self.tersor.attachments),
            ]
        self.nbytes = sum(file.stat().st_size for file in (*self.files, *self.beside.values()))

    @property
    def slots(self):  # type: ignore[no-untyped-def]
        """Dtypes and shapes of a checkpoint's tensors."""
        return self.tensors.slots if self.tensors else {}

    def array(self, name: str) -> Tensor:
        """A tensor, a decoded leaf, or the stored bytes of an attachment."""
        if self.beside and name not in self.slots:
            return bytes_tensor(self.text(name) or b"")
        return self.tensors.read(name) if self.tensors else self.leaf(name).array

    def text(self, name: str) -> bytes | None:
        """The bytes of an attachment, inflated, or of a file beside the weights. None for other arrays."""
        short = name.removeprefix(ATTACHMENT)
        if short == name:
            return None
        if self.tersor is not None:
            return self.tersor.attachment(short) if short in self.tersor.attachments else None
        return read_along(self.beside[short]) if short in self.beside else None

    def leaf(self, name: str) -> StoredLeaf:
        """A leaf of a .tersor file."""
        if self.tersor is None:
            raise FormatError(f"{self.path}: it is not a .tersor file, so {name[:200]} has no leaves")
        if name not in self.tersor.places.found:  # an attachment
            data = Dense(self.tersor.source.read(name))
            return StoredLeaf(data, data.array, None, None)
        site = self.tersor.places.owner[name]
        if site in self.tersor.grids:
            grid = self.tersor.grid(site)
            return {n: StoredLeaf(node, node.decode(), None, None) for _, n, node in leaves(grid, site)}[name]
        if self.site[0] != site:
            form = self.tersor.read(site)
            self.tersor.check(site, form)
            self.site = site, dict(leaves_of(form, site))
        return self.site[1][name]

    def head(self) -> bytes:
        """The JSON of the file: its text, or the header of a safetensors file; else b""."""
        if self.tersor is not None:
            return dump(self.tersor.text)
        return header_of(self.path) if os.path.isfile(self.path) else b""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the file. For a folder it covers names, sizes and bytes of its files of weights."""
        sha = hashlib.sha256()
        for file in self.files:
            if file != self.path:
                sha.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as source:
                while piece := source.read(CHUNK):
                    sha.update(piece)
        return sha.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self.tersor, self.tensors):
            if file is not None:
                file.__exit__(kind, error, trace)


def header_of(path: Path) -> bytes:
    """The JSON of a safetensors file's header; b"" for another file."""
    with open(path, "rb") as file:
        first = file.read(9)
        return first[8:] + file.read(int.from_bytes(first[:8], "little") - 1) if first[8:] == b"{" else b""


def is_folder(found: Checkpoint) -> bool:
    """Whether a patch can make these files byte for byte: a folder whose weights are all .safetensors."""
    same = all(isinstance(part, SafetensorsCheckpoint) for part in found.opened)
    return found.folder is not None and same and not any(name.startswith(ATTACHMENT) for name in found.slots)


def beside(found: Checkpoint) -> dict[str, Path]:
    """The files of a folder that go along with its weights, and the index, by name."""
    folder = found.folder
    return (
        {} if folder is None else folder.along | ({folder.index.name: folder.index} if folder.index else {})
    )


def kind_of(path: Path) -> str:
    """ "tersor" for a .tersor file, "tersor-patch" for a patch, else ""."""
    with suppress(FormatError):
        if os.path.isfile(path):
            with Source(path) as source:
                keys = ("tersor",) if source.tiny else source.metadata
                return next((key for key in ("tersor", PATCH) if key in keys), "")
    return ""


def leaves_of(form: Form, site: str) -> Iterator[tuple[str, StoredLeaf]]:
    """(name, leaf) of each leaf of a site."""
    plain, nodes = dict(uncoded(form).walk()), {at.path: at for at in At(form).down()}
    found = list(leaves(form, site))
    for path, name, stored in found:
        above, _, word = path.rpartition(".")
        parent, dense = nodes[above].node, plain[path]
        if not isinstance(dense, Dense):
            raise FormatError(f"{name[:200]}: the leaf is not an array")
        keep = mask_above(nodes, path, site) if isinstance(stored, Coded) and stored.kept else None
        grid: UniformGrid | None = None
        tables: tuple[str, ...] = ()
        if isinstance(parent, Affine) and word == "codes" and not parent.runs and parent.member is None:
            scale, zero = table_of(parent.scale), None if parent.zero is None else table_of(parent.zero)
            if scale is not None and (zero is not None or parent.zero is None):
                grid = UniformGrid(scale, zero, parent.group, parent.axis)
                stem = path.removesuffix(word)
                tables = tuple(n for p, n, _ in found if p.startswith((f"{stem}scale", f"{stem}zero")))
        yield name, StoredLeaf(stored, dense.array, keep, grid, tables)


def mask_above(nodes: dict[str, At], path: str, site: str) -> str:
    """Name of the only mask above a path; "" if there are several or the mask is not a leaf."""
    masks = nodes[path].masks
    return f"{site}:{masks[0]}" if len(masks) == 1 and not nodes[masks[0]].node.children() else ""
