"""Form JSON: forms as the short JSON of a file, and the place of each leaf's bytes. docs/format.md section 5.

A leaf is the tensor of its name, or if it is below 1,024 bytes a range after the text, since an entry in the
header would take 80 bytes. Shapes and dtypes that follow from a leaf's position in the tree are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from tersor.dtypes import NAMED
from tersor.errors import FormatError
from tersor.forms import FORMS, Coded, Dense, Form, Grid, Node
from tersor.forms.node import child_names
from tersor.io.header import Slot, check_shape

SMALL = 1024  # bytes from which a leaf is a tensor of its own
GRID = {"scale": "float32", "zero": "int16"}  # dtypes of a grid's children, if not stated
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a leaf's bytes are."""

    dtype: torch.dtype
    shape: Shape
    begin: int  # from the start of the file, or of the small leaves
    end: int
    small: bool


def implied(kind: type[Form], key: str, shape: Shape | None, dtype: str) -> tuple[Shape | None, str]:
    """(shape, dtype) of a child if the JSON states none, for a parent of this kind, shape and dtype."""
    return shape if key in (kind.mask, *kind.aligned) else None, kind.dtypes.get(key, dtype)


def terse(form: Form, shape: Shape | None, dtype: str, small: Callable[[str], bool], path: str = "") -> Any:
    """The tree of a form with this implied shape and dtype. `small(path)`: whether that leaf is small."""
    node: dict[str, Any] = {"form": form.name, **form.settings()}
    if isinstance(form, Coded):
        stated = {"size": (form.size, shape), "dtype": (form.dtype, dtype)}
        for key in [key for key, (own, default) in stated.items() if own == default]:
            del node[key]
    if isinstance(form, Dense) and small(path):
        own = str(form.dtype).removeprefix("torch.")
        node |= {} if own == dtype else {"dtype": own}
        node |= {} if form.shape == shape else {"shape": form.shape}
    for key, child in form.children().items():
        below = f"{path}.{key}" if path else key
        node[key] = terse(child, *implied(type(form), key, shape, dtype), small, below)
    return form.name if len(node) == 1 else node


def terse_grid(grid: Grid, small: Callable[[str], bool]) -> Any:
    """The tree of an edge's grid."""
    node: dict[str, Any] = {"form": grid.name, **grid.settings()}
    for key, child in grid.children().items():
        node[key] = terse(cast(Form, child), None, GRID[key], small, key)
    return node


class Places:
    """Visits the trees of a file in order and finds the bytes of each leaf."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self.slots = slots
        self.found: dict[str, Place] = {}
        self.owner: dict[str, str] = {}  # the site or edge of each leaf
        self.blobs: set[str] = set()
        self.at = 0  # where the next small leaf begins

    def full(self, node: Any, shape: Shape, dtype: str, site: str) -> Any:
        """The tree with nothing left out, as record/node_json.py reads it. That checks the settings."""
        return self._full(node, shape, dtype, site, "")

    def grid(self, node: Any, edge: str) -> Any:
        """The tree of an edge's grid, likewise."""
        if not isinstance(node, dict) or node.get("form") != Grid.name:
            raise FormatError(f"{edge[:200]}: an edge has a grid, not {str(node)[:40]!r}")
        return {**node, **{k: self._full(node[k], None, GRID[k], edge, k) for k in GRID if k in node}}

    def _full(self, node: Any, shape: Shape | None, dtype: str, site: str, path: str) -> Any:
        name = f"{site}:{path}" if path else site
        node = {"form": node} if isinstance(node, str) else node
        word = node.get("form") if isinstance(node, dict) else None
        kind = FORMS.get(word) if isinstance(word, str) else None
        if kind is None:
            raise FormatError(
                f"{name[:200]}: form {str(word)[:40]!r} is not known; known are {', '.join(FORMS)}"
            )
        if kind in (Coded, Dense) and (name in self.found or name == "tersor"):
            raise FormatError(f"{name[:200]}: two leaves have this name")
        if kind in (Coded, Dense):
            self.owner[name] = site
        if kind is Coded:
            return self._coded({"size": _listed(shape), "dtype": dtype} | node, name)
        if kind is Dense:
            self._dense(node, shape, dtype, name)
            return {"form": "dense"}
        full = dict(node)
        for key in child_names(kind):
            if key in node:
                below = f"{path}.{key}" if path else key
                full[key] = self._full(node[key], *implied(kind, key, shape, dtype), site, below)
        return full

    def _coded(self, node: dict[str, Any], name: str) -> dict[str, Any]:
        planes = node.get("planes")
        if not isinstance(planes, list) or not all(type(n) is int and n >= 0 for n in planes):
            raise FormatError(f"{name}: planes lists the bytes of each stream, not {str(planes)[:60]}")
        node["size"] = list(check_shape(node["size"], f"{name}: size"))
        slot = self.slots.get(name)
        self._place(name, slot, torch.uint8, (sum(planes),))
        return node

    def _dense(self, node: dict[str, Any], shape: Shape | None, dtype: str, name: str) -> None:
        slot = self.slots.get(name)
        unknown = node.keys() - ({"form"} if slot else {"form", "shape", "dtype"})
        if unknown:
            raise FormatError(f"{name}: dense has no setting {min(unknown)[:40]!r} here")
        if slot:
            self._place(name, slot, slot.dtype, slot.shape)
            return
        word, size = (
            node.get("dtype", dtype),
            check_shape(node.get("shape", _listed(shape)), f"{name}: shape"),
        )
        if type(word) is not str or word not in NAMED:
            raise FormatError(f"{name}: dtype {str(word)[:40]!r} is not known; known are {', '.join(NAMED)}")
        self._place(name, None, NAMED[word], size)

    def _place(self, name: str, slot: Slot | None, dtype: torch.dtype, shape: Shape) -> None:
        if slot is not None:
            self.found[name] = Place(dtype, shape, slot.begin, slot.end, small=False)
            return
        end = self.at + math.prod(shape) * dtype.itemsize
        self.found[name] = Place(dtype, shape, self.at, end, small=True)
        self.at = end

    def attached(self, name: str) -> None:
        """Mark a tensor as that of an attachment."""
        if name in self.found:
            raise FormatError(f"{name[:200]}: an attachment and a leaf have this name")
        self.blobs.add(name)

    def check_all_used(self, small: int) -> None:
        """FormatError unless each tensor is used and small leaves fill the `small` bytes after the text."""
        used = {"tersor", *self.found, *self.blobs}
        unused = [name for name in self.slots if name not in used]
        if unused:
            more = f", nor {len(unused) - 1} more" if len(unused) > 1 else ""
            raise FormatError(f"{unused[0][:200]}: no form uses this tensor{more}")
        if self.at != small:
            raise FormatError(f"its small leaves take {self.at:,} bytes, but {small:,} follow the text")


def _listed(shape: Shape | None) -> list[int] | None:
    return None if shape is None else list(shape)


def leaves(form: Node, site: str) -> Iterator[tuple[str, str, Form]]:
    """(path, name, leaf) of each leaf, in the order of the text."""
    for path, node in form.walk():
        if node.arrays():
            yield path, f"{site}:{path}" if path else site, cast(Form, node)
