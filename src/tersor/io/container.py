"""Container: the reader of .tersor files: safetensors files with one tensor that describes the others.

header, text, then for each site: its leaves, digest, structure and contents     docs/format.md
Header and text are checked when the file is opened, sites when they are read. The writer is
container_writer.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from tersor.core.state import State
from tersor.errors import FormatError, SiteError, did_you_mean
from tersor.forms import FORMS, NODES, Form, Grid, Node
from tersor.io.attached import check_notes
from tersor.io.dictionary import DICTIONARY
from tersor.io.document import (
    ATTACHMENT,
    KEYS,
    TINY,
    aliases_from_json,
    attachments_from_json,
    changes_from_json,
    edges_from_json,
    indices_from_json,
    shape_of,
    site_from_json,
)
from tersor.io.form_json import Places
from tersor.io.header import natural
from tersor.io.json_text import inflate, inflate_up_to, of_type, only, parse
from tersor.io.ledger_json import ledger_from_json
from tersor.io.pool import in_order
from tersor.io.safetensors_file import as_tensor, bytes_tensor
from tersor.io.short_header import Source, read_short_header
from tersor.io.sniff import PACK
from tersor.io.validate import contents, grid_contents, grid_structure, limit_for, plain_of, slices, structure
from tersor.model.sites import Site
from tersor.record.node_json import unflatten

Found = TypeVar("Found")

NUMBER = 1
TEXT = "tersor"  # the name of the tensor that holds the text and the small leaves


def load(path: str | os.PathLike[str], *, limit: int | None = None) -> State:
    """Read and check a whole compressed model. FormatError if the file is damaged or not a .tersor file,
    StorageError if it cannot be opened.

    `limit`: elements that the file may declare. Default: 16,777,216 + 1,024 per byte of the file.
    """
    with TersorFile(path, limit=limit) as file:
        return file.state({name: form for name, form, _ in file.decoded(file.sites, exhaust)})


def load_with(
    path: str | os.PathLike[str], look: Callable[[Form, Form], Found]
) -> tuple[State, dict[str, Found]]:
    """A whole model, checked as by load, and for each site look(form, the form without coded leaves)."""
    with TersorFile(path) as file:

        def work(name: str, form: Form) -> tuple[Form, Found]:
            file.check(name, form)
            with file.naming():
                plain = plain_of(form, file.sites[name])
                plain.decode()
            return form, look(form, plain)

        found = dict(zip(file.sites, in_order(file.sites, file.nbytes, file.read, work), strict=True))
        state = file.state({name: form for name, (form, _) in found.items()})
        return state, {name: seen for name, (_, seen) in found.items()}


def read_tensor(path: str | os.PathLike[str], name: str, *, limit: int | None = None) -> Tensor:
    """One decoded tensor by name or alias; the other tensors are not read. SiteError for an unknown name."""
    with TersorFile(path, limit=limit) as file:
        return file.tensor(name)


def exhaust(name: str, slices: Iterator[Tensor]) -> None:
    """Decode a tensor and drop it: a check that it can be decoded."""
    for _ in slices:
        pass


class TersorFile:
    """An open .tersor file. Its text is read and checked on opening; weights are read one by one."""

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None) -> None:
        self.path = Path(path)
        self.source = Source(self.path)
        self.limit = limit_for(self.source.nbytes) if limit is None else limit
        self.elements = 0  # declared by the sites read so far
        self.counted: set[str] = set()
        self.trees: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.kept: dict[str, dict[int, tuple[int, ...]]] = {}
        self.grids: dict[str, Any] = {}  # edge -> tree
        self.digests: dict[str, str] = {}
        try:
            with self.naming():
                self.text, self.small = self._text()
                self._document()
        except FormatError:
            self.close()
            raise

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Put the file's path before the message of a FormatError."""
        try:
            yield
        except FormatError as error:
            message = str(error)
            known = message.startswith(str(self.path))
            raise FormatError(message if known else f"{self.path}: {message}") from None

    def _text(self) -> tuple[Any, Tensor]:
        if self.source.tiny:
            text, small = read_short_header(self.source)
            return parse(text, "its text"), bytes_tensor(small)
        metadata, slots = self.source.metadata, self.source.slots
        number = metadata.get("tersor")
        if number is None:
            raise FormatError(
                f"it is a safetensors file, but not a .tersor file: its metadata lacks 'tersor'. {PACK}"
            )
        if number != str(NUMBER):
            if natural(number) is None:
                raise FormatError(f"its format number is {number[:20]!r}: the file is damaged")
            raise FormatError(
                f"has format {number}; this version reads {NUMBER}. A newer tersor may read it."
            )
        size, slot = natural(metadata.get("size", "")), slots.get(TEXT)
        if size is None or slot is None or slot.dtype is not torch.uint8 or len(slot.shape) != 1:
            raise FormatError(f"it needs the metadata 'size' and a tensor {TEXT!r} of U8 in one dimension")
        text, small = inflate(self.source.bytes(slot.begin, slot.end), size)
        if metadata.get("crc") != f"{zlib.crc32(text):08x}":
            raise FormatError("its text is damaged: its CRC is not the one in the metadata")
        return parse(text, "its text"), bytes_tensor(small)

    def _document(self) -> None:
        document, tiny = of_type(self.text, dict, "its text"), self.source.tiny
        only(document, TINY if tiny else KEYS, "its text")
        self.places = Places(self.source.slots)
        indices = indices_from_json(document.get("indices", []), self.source.nbytes)
        for name, entry in of_type(document.get("sites"), dict, "sites").items():
            site, self.digests[name], tree, kept = site_from_json(name, entry, indices, tiny=tiny)
            self.trees[name] = self.places.full(tree, shape_of(site, kept), site.dtype, name)
            self.sites[name] = site
            self.kept |= {name: kept} if kept else {}
        self.changes = changes_from_json(document.get("changes", []))
        edges = edges_from_json(document.get("grids", {}), self.sites, tiny=tiny)
        for edge, signed, tree in edges:
            self.digests[edge] = signed
            self.grids[edge] = self.places.grid(tree, edge)
        self.attachments = attachments_from_json(document.get("attachments", {}), self.source.slots)
        for name in self.attachments:
            self.places.attached(f"{ATTACHMENT}{name}")
        self.places.check_all_used(len(self.small))
        self.aliases = aliases_from_json(document.get("aliases", {}), self.sites)
        self.ledger = ledger_from_json(document, self.digests)

    def state(self, forms: Mapping[str, Form]) -> State:
        """The model of the file, with these forms of all its sites."""
        attached = {name: self.attachment(name) for name in self.attachments}
        grids = {edge: self.grid(edge) for edge in self.grids}
        return State(
            self.sites, forms, self.aliases, self.ledger, kept=self.kept, changes=self.changes, grids=grids,
            attachments=attached,
        )  # fmt: skip

    def form(self, name: str) -> Form:
        """The form of a site. FormatError if its digest is wrong or its nodes do not fit together."""
        form = self.read(name)
        self.check(name, form)
        return form

    def read(self, name: str) -> Form:
        """The form of a site, without a check of its digest. FormatError if its nodes do not fit together."""
        with self.naming():
            form = unflatten(self.trees[name], name, self._leaf, FORMS)
            self._count(name, structure(form, self.sites[name], self.shape(name)))
            return form

    def grid(self, edge: str) -> Grid:
        """The grid of an edge, checked."""
        with self.naming():
            grid = cast(Grid, unflatten(self.grids[edge], edge, self._leaf, NODES))
            self._count(edge, grid_structure(grid, edge))
            self.check(edge, grid)
            grid_contents(grid, edge)
            return grid

    def check(self, name: str, form: Node) -> None:
        """Refuse a form with a wrong digest. A tiny file has no digests; its CRC was checked on opening."""
        with self.naming():
            if self.digests[name] and form.digest != self.digests[name]:
                raise FormatError(
                    f"{name}: damaged: its digest is {form.digest}, the text says {self.digests[name]}. "
                    f"Download or write the file again."
                )

    def decoded(
        self, names: Iterable[str], use: Callable[[str, Iterator[Tensor]], Found], workers: int | None = None
    ) -> Iterator[tuple[str, Form, Found]]:
        """(name, form, use(name, slices)) for each of these sites, in order, on all cores. `slices`: the
        decoded tensor, flat and in the site's dtype, decoded slice by slice as it is consumed."""

        def work(name: str, form: Form) -> tuple[str, Form, Found]:
            self.check(name, form)
            return name, form, use(name, self.slices(name, form))

        return in_order(names, self.nbytes, self.read, work, workers)

    def nbytes(self, name: str) -> int:
        """Bytes of a decoded tensor."""
        return math.prod(self.shape(name)) * self.sites[name].torch_dtype.itemsize

    def _leaf(self, name: str) -> Tensor:
        place = self.places.found[name]
        if not place.small:
            return self.source.read(name)
        data = self.small[place.begin : place.end].clone()
        return as_tensor(data, place.dtype, place.shape, name)

    def _count(self, name: str, elements: int) -> None:
        self.elements += elements if name not in self.counted else 0
        self.counted.add(name)
        if self.elements > self.limit:
            raise FormatError(
                f"{name}: with it the file declares {self.elements:,} elements, but its "
                f"{self.source.nbytes:,} bytes justify {self.limit:,}. "
                f"If you trust the file, raise the limit: load(path, limit={2 * self.elements})"
            )

    def contents(self, name: str, form: Form) -> Tensor:
        """The decoded tensor of a site, in the site's dtype."""
        with self.naming():
            return contents(form, self.sites[name])

    def slices(self, name: str, form: Form) -> Iterator[Tensor]:
        """The decoded tensor of a site, a slice at a time."""
        with self.naming():
            yield from slices(form, self.sites[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a site as stored, after cuts."""
        return shape_of(self.sites[name], self.kept.get(name, {}))

    def check_rest(self) -> None:
        """Read and check grids and attachments."""
        for edge in self.grids:
            self.grid(edge)
        for name in self.attachments:
            self.attachment(name)

    def attachment(self, name: str) -> bytes:
        """The bytes of an attachment. FormatError if its length or SHA-256 is wrong."""
        with self.naming():
            entry, slot = self.attachments[name], self.source.slots[f"{ATTACHMENT}{name}"]
            data = self.source.bytes(slot.begin, slot.end)
            if entry.get("deflated", False):
                data, rest, whole = inflate_up_to(data, entry["nbytes"], DICTIONARY)
                if rest or not whole:
                    raise FormatError(f"attachments: {name[:100]} is damaged: its length is wrong")
            if len(data) != entry["nbytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise FormatError(
                    f"attachments: {name[:100]} is damaged: its SHA-256 is not the one in the text"
                )
            check_notes(name, data)
            return data

    def tensor(self, name: str) -> Tensor:
        """One decoded tensor, by name or alias."""
        site = self.aliases.get(name, name)
        if site not in self.sites:
            known = [*self.sites, *self.aliases]
            raise SiteError(f"{self.path}: no tensor {name!r}; {did_you_mean(name, known)}")
        return self.contents(site, self.form(site))

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
