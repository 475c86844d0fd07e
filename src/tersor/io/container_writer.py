"""Container writer: writes .tersor files. container.py is the reader, docs/format.md the format.

Sites are written one by one to a temporary file, then header and payload to another one, which is moved into
place when complete. Equal states give equal bytes.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tersor.core.state import Kept, State
from tersor.dtypes import unsupported
from tersor.errors import RefusedError
from tersor.files import atomic, output
from tersor.forms import Form, Grid, Node
from tersor.forms.form import as_bytes
from tersor.io.container import NUMBER, TEXT
from tersor.io.document import (
    ATTACHMENT,
    INDICES,
    attachment_name,
    changes_to_json,
    runs_of,
    shape_of,
    site_to_json,
)
from tersor.io.form_json import SMALL, leaves, terse, terse_grid
from tersor.io.json_text import deflate, dump
from tersor.io.ledger_json import history_to_json
from tersor.io.safetensors_file import TensorWriter, bytes_tensor
from tersor.io.short_header import write_short_header
from tersor.io.validate import grid_contents, grid_structure, structure
from tersor.model.changes import Replace, Set
from tersor.model.sites import Site
from tersor.model.versions import VERSIONS, unusual_of
from tersor.record.ledger import Ledger


def save(result: State, path: str | os.PathLike[str], *, ledger: bool = True, tiny: bool = False) -> int:
    """Write a compressed model. Equal states give equal bytes. Returns the number of bytes.

    `ledger=False` leaves out recipe and ledger. `tiny` also does, and writes a header of about 100 bytes with
    one checksum: for files of a few kB, which are read whole. StorageError if the file cannot be
    written; an existing file is replaced only when the new one is complete.
    """
    path = output(path)
    with atomic(path) as out, TensorWriter(path.parent) as tensors:
        builder = Builder(tensors, tiny=tiny)
        for name, site in result.sites.items():
            builder.add(site, result.forms[name], result.kept.get(name))
        for edge, grid in result.grids.items():
            builder.grid(edge, grid)
        for name, data in attached(result, tiny=tiny).items():
            builder.attach(name, data)
        return builder.finish(out, result.aliases, result.ledger, changes=result.changes, history=ledger)


def attached(result: State, *, tiny: bool) -> Mapping[str, bytes]:
    """The attachments, with the unusual versions of the model's modules."""
    if result.given is None or tiny:
        return result.attachments
    stated = unusual_of(result.given, {*result.sites, *result.aliases})
    rest = {name: data for name, data in result.attachments.items() if name != VERSIONS}
    return rest | ({VERSIONS: dump(stated)} if stated else {})


class Builder:
    """Takes sites one by one, then writes the text and the file. Keeps only a site's JSON in memory."""

    def __init__(self, tensors: TensorWriter, *, tiny: bool = False) -> None:
        self.tensors, self.tiny = tensors, tiny
        self.sites: dict[str, Any] = {}
        self.digests: dict[str, str] = {}
        self.names = {TEXT}
        self.small: list[bytes] = []
        self.indices: dict[tuple[int, ...], int] = {}  # list of kept indices -> its number
        self.grids: dict[str, Any] = {}
        self.attached: dict[str, Any] = {}

    def add(self, site: Site, form: Form, kept: Kept | None = None) -> None:
        if why := unsupported(getattr(torch, site.dtype)):
            raise RefusedError(f"{site.name}: it is {why}")
        structure(form, site, shape_of(site, kept or {}))
        small = self._leaves(form, site.name)
        self.digests[site.name] = form.digest
        tree = terse(form, tuple(form.shape), site.dtype, small.__contains__)
        axes = {axis: self._list(index, site, axis) for axis, index in (kept or {}).items()}
        self.sites[site.name] = site_to_json(site, None if self.tiny else form.digest, tree, axes)

    def _list(self, index: tuple[int, ...], site: Site, axis: int) -> int:
        """The number of a list of kept indices along an axis."""
        if len(set(index)) < len(index) or not all(0 <= i < site.shape[axis] for i in index):
            raise RefusedError(
                f"{site.name}: its cut of axis {axis} keeps an index twice, or one out of range"
            )
        return self.indices.setdefault(index, len(self.indices))

    def grid(self, edge: str, grid: Grid) -> None:
        """Add the grid of an edge, after all sites."""
        if edge in self.sites:
            raise RefusedError(
                f"{edge}: a site and an edge of the graph have this name; rename one in the model"
            )
        grid_structure(grid, edge)
        grid_contents(grid, edge)
        self.digests[edge] = grid.digest
        signed = {"digest": grid.digest} if not self.tiny else {}
        self.grids[edge] = signed | {"form": terse_grid(grid, self._leaves(grid, edge).__contains__)}

    def _leaves(self, node: Node, name: str) -> set[str]:
        """Store leaves: small ones after the text, others as tensors. Returns the paths of small ones."""
        small = set()
        for path, full, leaf in leaves(node, name):
            self.claim(full)
            (array,) = leaf.arrays().values()
            if self.tiny or array.nbytes < SMALL:
                small.add(path)
                self.small.append(as_bytes(array).tobytes())
            else:
                self.tensors.add(full, array)
        return small

    def claim(self, name: str) -> None:
        if name in self.names:
            raise RefusedError(
                f"{name}: two tensors of the file would have this name; rename one in the model"
            )
        self.names.add(name)

    def attach(self, name: str, data: bytes) -> None:
        """Add a named file, stored beside the weights."""
        if self.tiny:
            raise RefusedError(f"tiny: a file with the short header holds no attachment, such as {name}")
        try:
            attachment_name(name)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        packed = deflate(data)
        fine = len(packed) < len(data)  # deflate() stays within what a reader inflates
        entry = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.attach_stored(
            name, entry | ({"deflated": True} if fine else {}), bytes_tensor(packed if fine else data)
        )

    def attach_stored(self, name: str, entry: Mapping[str, Any], data: Tensor) -> None:
        """Add an attachment from its JSON entry and its stored bytes, deflated or not."""
        self.claim(f"{ATTACHMENT}{name}")
        self.tensors.add(f"{ATTACHMENT}{name}", data)
        self.attached[name] = dict(entry)

    def finish(
        self, out: BinaryIO, aliases: Mapping[str, str], ledger: Ledger, *,
        changes: Iterable[Set | Replace] = (), history: bool = True,
    ) -> int:  # fmt: skip
        small = b"".join(self.small)
        if sum(map(len, self.indices)) > INDICES + self.tensors.nbytes + len(small):
            raise RefusedError(
                f"the cuts keep more indices than a file of this size may list: {INDICES:,} plus one per byte"
            )
        document: dict[str, Any] = {"sites": self.sites}
        parts = {
            "aliases": dict(aliases), "indices": [runs_of(index) for index in self.indices],
            "changes": changes_to_json(changes), "grids": self.grids, "attachments": self.attached,
        }  # fmt: skip
        document |= {key: value for key, value in parts.items() if value}
        try:
            if not self.tiny:
                document |= {"base": ledger.base} if ledger.base else {}
                document |= history_to_json(ledger, self.digests, len(self.sites)) if history else {}
            text = dump(document)
        except (ValueError, TypeError) as error:
            raise RefusedError(
                f"the file's text cannot be written: {error}. Notes and settings may hold numbers, text, "
                f"lists and objects, but no NaN and no infinity."
            ) from None
        if self.tiny:
            return write_short_header(out, text, small)
        data = deflate(text) + small
        self.tensors.add(TEXT, bytes_tensor(data))
        metadata = {"tersor": str(NUMBER), "size": str(len(text)), "crc": f"{zlib.crc32(text):08x}"}
        return self.tensors.finish(out, metadata)
