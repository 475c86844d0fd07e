"""Container: model.tersor, a safetensors file with one more tensor that tells what the others mean.

save   sites one by one to a temporary file, then header and payload, moved into place when whole
load   header, text, then each site: its leaves, its digest, its structure, its contents     docs/format.md
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from tersor.core.state import State
from tersor.errors import FormatError, SiteError, did_you_mean
from tersor.files import atomic, output
from tersor.forms import FORMS, NODES, Form, Grid, Node
from tersor.io.builder import ATTACHMENT, NUMBER, TEXT, Builder
from tersor.io.dictionary import DICTIONARY
from tersor.io.document import (
    KEYS,
    TINY,
    aliases_from_json,
    changes_from_json,
    digest,
    indices_from_json,
    ledger_from_json,
    of_type,
    only,
    shape_of,
    site_from_json,
)
from tersor.io.header import natural
from tersor.io.looks import PACK
from tersor.io.pool import in_order
from tersor.io.tensors import TensorWriter, as_tensor, bytes_tensor
from tersor.io.text import allowed, inflate, inflate_up_to, parse
from tersor.io.tiny import Source, read_tiny
from tersor.io.trees import Places
from tersor.io.validate import contents, grid_structure, limit_for, slices, structure
from tersor.model.sites import Site
from tersor.record.flat import unflatten

Found = TypeVar("Found")


def save(result: State, path: str | os.PathLike[str], *, ledger: bool = True, tiny: bool = False) -> int:
    """Write a compressed model; the same result gives the same bytes. Returns their number.

    `ledger=False` leaves out recipe and ledger. `tiny` does too, and writes a header of some 100 bytes with
    one checksum for all: for files of a few kB, which are read whole. StorageError where the file cannot be
    written; what was there before stays until the new file is whole.
    """
    path = output(path)
    with atomic(path) as out, TensorWriter(path.parent) as tensors:
        builder = Builder(tensors, tiny=tiny)
        for name, site in result.sites.items():
            builder.add(site, result.forms[name], result.kept.get(name))
        for edge, grid in result.grids.items():
            builder.grid(edge, grid)
        for name, data in result.attachments.items():
            builder.attach(name, data)
        return builder.finish(out, result.aliases, result.ledger, changes=result.changes, history=ledger)


def load(path: str | os.PathLike[str], *, limit: int | None = None) -> State:
    """Read a compressed model, all of it, and check all of it. FormatError for what is not a whole, sound
    file; StorageError for what cannot be opened.

    `limit`: elements that the file may declare, in place of 16,777,216 + 1,024 for each of its bytes.
    """
    with TersorFile(path, limit=limit) as file:
        forms = {name: form for name, form, _ in file.decoded(file.sites, look)}
        attached = {name: file.attachment(name) for name in file.attachments}
        grids = {edge: file.grid(edge) for edge in file.grids}
        return State(
            file.sites, forms, file.aliases, file.ledger, kept=file.kept, changes=file.changes, grids=grids,
            attachments=attached,
        )  # fmt: skip


def read_tensor(path: str | os.PathLike[str], name: str, *, limit: int | None = None) -> Tensor:
    """One decoded tensor by its name or alias; the others are not read."""
    with TersorFile(path, limit=limit) as file:
        return file.tensor(name)


def look(name: str, slices: Iterator[Tensor]) -> None:
    """See that a tensor can be decoded."""
    for _ in slices:
        pass


class TersorFile:
    """An open .tersor file: its text is read and checked, its weights are read one by one."""

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None) -> None:
        self.path = Path(path)
        self.source = Source(self.path)
        self.limit = limit_for(self.source.nbytes) if limit is None else limit
        self.elements = 0  # declared by the sites that were read
        self.counted: set[str] = set()
        self.trees: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.kept: dict[str, dict[int, tuple[int, ...]]] = {}
        self.grids: dict[str, Any] = {}  # their trees
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
        """Put the file's name before what is found wrong in it."""
        try:
            yield
        except FormatError as error:
            said = str(error)
            raise FormatError(said if said.startswith(str(self.path)) else f"{self.path}: {said}") from None

    def _text(self) -> tuple[Any, Tensor]:
        if self.source.tiny:
            text, small = read_tiny(self.source)
            return parse(text, "its text"), bytes_tensor(small)
        metadata, slots = self.source.metadata, self.source.slots
        number = metadata.get("tersor")
        if number is None:
            raise FormatError(
                f"it is a safetensors file, but no .tersor file: its metadata lacks 'tersor'. {PACK}"
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
            raise FormatError("its text is damaged: it does not have the CRC that the metadata tells")
        return parse(text, "its text"), bytes_tensor(small)

    def _document(self) -> None:
        document, tiny = of_type(self.text, dict, "its text"), self.source.tiny
        only(document, TINY if tiny else KEYS, "its text")
        self.places = Places(self.source.slots)
        indices = indices_from_json(document.get("indices", []), self.source.nbytes)
        for name, told in of_type(document.get("sites"), dict, "sites").items():
            site, self.digests[name], tree, kept = site_from_json(name, told, indices, tiny=tiny)
            self.trees[name] = self.places.full(tree, shape_of(site, kept), site.dtype, name)
            self.sites[name] = site
            self.kept |= {name: kept} if kept else {}
        self.changes = changes_from_json(document.get("changes", []))
        for edge, told in of_type(document.get("grids", {}), dict, "grids").items():
            if edge in self.sites:
                raise FormatError(f"grids: {edge[:100]!r} is the name of a site")
            only(
                of_type(told, dict, f"grids: {edge[:100]}"),
                ("form", *(() if tiny else ("digest",))),
                "a grid",
            )
            self.digests[edge] = "" if tiny else digest(told.get("digest"), f"{edge[:100]}: digest")
            self.grids[edge] = self.places.grid(told.get("form"), edge)
        self.attachments = of_type(document.get("attachments", {}), dict, "attachments")
        for name in self.attachments:
            self.places.attached(f"{ATTACHMENT}{name}")
        self.places.check_all_used(len(self.small))
        self.aliases = aliases_from_json(document.get("aliases", {}), self.sites)
        self.ledger = ledger_from_json(document, self.digests)

    def form(self, name: str) -> Form:
        """The form of a site, if its bytes are the ones that were written and its parts fit."""
        form = self.read(name)
        self.check(name, form)
        return form

    def read(self, name: str) -> Form:
        """The form of a site as it stands in the file, if its parts fit; its bytes are not checked yet."""
        with self.naming():
            form = unflatten(self.trees[name], name, self._leaf, FORMS)
            self._count(name, structure(form, self.sites[name], self.shape(name)))
            return form

    def grid(self, edge: str) -> Grid:
        """The grid of an edge, checked."""
        with self.naming():
            grid: Node = unflatten(self.grids[edge], edge, self._leaf, NODES)
            if not isinstance(grid, Grid):
                raise FormatError(f"{edge}: an edge has a grid, not a form")
            self._count(edge, grid_structure(grid, edge))
            self.check(edge, grid)
            return grid

    def check(self, name: str, form: Node) -> None:
        """Refuse a form whose bytes are not those that were written. A tiny file was checked as a whole."""
        with self.naming():
            if self.digests[name] and form.digest != self.digests[name]:
                raise FormatError(
                    f"{name}: damaged: its digest is {form.digest}, the text says {self.digests[name]}. "
                    f"Fetch or write the file again."
                )

    def decoded(
        self, names: Iterable[str], use: Callable[[str, Iterator[Tensor]], Found], workers: int | None = None
    ) -> Iterator[tuple[str, Form, Found]]:
        """(name, form, use(name, slices)) of these sites in order, on all cores. The slices are those of the
        decoded tensor, flat and in the site's dtype, made as they are taken."""

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
        """What the site's form decodes to, in the site's dtype."""
        with self.naming():
            return contents(form, self.sites[name])

    def slices(self, name: str, form: Form) -> Iterator[Tensor]:
        """The same, a slice at a time."""
        with self.naming():
            yield from slices(form, self.sites[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a site as it is stored."""
        return shape_of(self.sites[name], self.kept.get(name, {}))

    def attachment(self, name: str) -> bytes:
        """A named file that goes with the weights; FormatError where its bytes are not those it was made of."""
        with self.naming():
            who, told = f"attachments: {name[:100]}", self.attachments[name]
            only(of_type(told, dict, who), ("nbytes", "sha256", "deflated"), who)
            slot = self.source.slots[f"{ATTACHMENT}{name}"]
            data = self.source.bytes(slot.begin, slot.end)
            nbytes = of_type(told.get("nbytes"), int, f"{who}: nbytes")
            if told.get("deflated", False):
                if not 0 <= nbytes <= allowed(len(data)):
                    raise FormatError(f"{who} tells {nbytes:,} bytes, more than its {len(data):,} justify")
                data = inflate_up_to(data, nbytes, DICTIONARY)[0]
            if len(data) != nbytes or hashlib.sha256(data).hexdigest() != told.get("sha256"):
                raise FormatError(f"{who} is damaged: its SHA-256 is not the one that the text tells")
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
