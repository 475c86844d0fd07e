"""Builder: the writer of .tersor files: sites one by one, then the text, then the whole file. docs/format.md"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from tersor.core.state import Kept
from tersor.errors import RefusedError
from tersor.forms import Form, Grid, Node
from tersor.forms.form import as_bytes
from tersor.io.document import (
    changes_to_json,
    history_to_json,
    runs_of,
    shape_of,
    site_to_json,
)
from tersor.io.tensors import TensorWriter, bytes_tensor
from tersor.io.text import deflate, dump
from tersor.io.tiny import write_tiny
from tersor.io.trees import SMALL, leaves, terse, terse_grid
from tersor.io.validate import grid_structure, structure
from tersor.model.changes import Replace, Set
from tersor.model.sites import Site
from tersor.record.ledger import Ledger

NUMBER = 1
TEXT = "tersor"  # the name of the tensor that holds the text and the small leaves
ATTACHMENT = "attachment:"  # before the name of one, in the name of its tensor


class Builder:
    """Takes sites one by one, then writes the text and the file. Keeps of a site what the text says."""

    def __init__(self, tensors: TensorWriter, *, tiny: bool = False) -> None:
        self.tensors, self.tiny = tensors, tiny
        self.sites: dict[str, Any] = {}
        self.digests: dict[str, str] = {}
        self.names = {TEXT}
        self.small: list[bytes] = []
        self.indices: dict[tuple[int, ...], int] = {}  # lists of indices that are present -> their number
        self.grids: dict[str, Any] = {}
        self.attached: dict[str, Any] = {}

    def add(self, site: Site, form: Form, kept: Kept | None = None) -> None:
        structure(form, site, shape_of(site, kept or {}))
        small = self._leaves(form, site.name)
        self.digests[site.name] = form.digest
        tree = terse(form, tuple(form.shape), site.dtype, small.__contains__)
        axes = {
            axis: self.indices.setdefault(index, len(self.indices)) for axis, index in (kept or {}).items()
        }
        self.sites[site.name] = site_to_json(site, None if self.tiny else form.digest, tree, axes)

    def grid(self, edge: str, grid: Grid) -> None:
        """The grid of an edge, behind the sites."""
        grid_structure(grid, edge)
        told = {"digest": grid.digest} if not self.tiny else {}
        self.grids[edge] = told | {"form": terse_grid(grid, self._leaves(grid, edge).__contains__)}

    def _leaves(self, node: Node, name: str) -> set[str]:
        """Put a tree's leaves where they belong; the paths of those that are small."""
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
        """A named file that goes with the weights."""
        if self.tiny:
            raise RefusedError(f"tiny: a file with the short header holds no attachment, such as {name}")
        packed = deflate(data)
        fine = len(packed) < len(data)  # deflate() keeps to what a reader inflates
        self.claim(f"{ATTACHMENT}{name}")
        self.tensors.add(f"{ATTACHMENT}{name}", bytes_tensor(packed if fine else data))
        told = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.attached[name] = told | ({"deflated": True} if fine else {})

    def finish(
        self, out: BinaryIO, aliases: Mapping[str, str], ledger: Ledger, *,
        changes: Iterable[Set | Replace] = (), history: bool = True,
    ) -> int:  # fmt: skip
        document: dict[str, Any] = {"sites": self.sites}
        parts = {
            "aliases": dict(aliases), "indices": [runs_of(index) for index in self.indices],
            "changes": changes_to_json(changes), "grids": self.grids, "attachments": self.attached,
        }  # fmt: skip
        document |= {key: value for key, value in parts.items() if value}
        if not self.tiny:
            document |= {"base": ledger.base} if ledger.base else {}
        try:
            if history and not self.tiny:
                document |= history_to_json(ledger, self.digests, len(self.sites))
            text = dump(document)
        except (ValueError, TypeError) as error:
            raise RefusedError(
                f"the file's text cannot be written: {error}. Notes and settings hold numbers, text, "
                f"lists and objects; no NaN, no infinity."
            ) from None
        if self.tiny:
            return write_tiny(out, text, b"".join(self.small))
        data = deflate(text) + b"".join(self.small)
        self.tensors.add(TEXT, bytes_tensor(data))
        metadata = {"tersor": str(NUMBER), "size": str(len(text)), "crc": f"{zlib.crc32(text):08x}"}
        return self.tensors.finish(out, metadata)
