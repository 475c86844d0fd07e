"""Node: a small tree of frozen values that a state holds: the form of a weight or the grid of an edge.

A leaf holds an array; an inner node has children. A field that is a Node is a child, a tensor is an array,
None is absent, anything else is a setting. Digest, size and traversal use the fields alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tersor.dtypes import in_bytes

NUMBERS = 1 << 16  # longest list in a setting that a reader accepts
DIGEST = 16  # hex digits of a digest: 64 bits, enough to tell states apart, not to stop a forger


@dataclass(frozen=True, eq=False)
class Node:
    """A value with a name, arrays, children and settings. Its arrays are never written to."""

    name: ClassVar[str]

    def children(self) -> Mapping[str, Node]:
        return dict(self._fields[0])

    def arrays(self) -> dict[str, Tensor]:
        return dict(self._fields[1])

    def outlines(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each array."""
        return {key: (array.dtype, tuple(array.shape)) for key, array in self.arrays().items()}

    def payload(self) -> Iterator[np.ndarray]:
        """The bytes of the arrays, in order."""
        return (as_bytes(array) for array in self.arrays().values())

    def settings(self) -> dict[str, Any]:
        """Fields that are neither children nor arrays nor at their default: this node's entries in JSON."""
        return dict(self._fields[2])

    @cached_property
    def _fields(self) -> tuple[dict[str, Node], dict[str, Tensor], dict[str, Any]]:
        """Children, arrays and settings, sorted once: they are asked for often."""
        usual: dict[str, Any] = defaults_of(type(self))  # type: ignore[arg-type]
        every = {key: getattr(self, key) for key in usual}
        nodes = {key: value for key, value in every.items() if isinstance(value, Node)}
        arrays = {key: value for key, value in every.items() if isinstance(value, Tensor)}
        rest = {k: v for k, v in every.items() if k not in nodes and k not in arrays and v != usual[k]}
        return nodes, arrays, rest

    @cached_property
    def digest(self) -> str:
        """SHA-256 over arrays, settings and children, 16 hex digits; the same on every machine."""
        sha = hashlib.sha256()
        head = {
            "form": self.name,
            "settings": self.settings(),
            "children": {key: child.digest for key, child in self.children().items()},
            "arrays": {key: [str(dtype), list(shape)] for key, (dtype, shape) in self.outlines().items()},
        }
        sha.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        for data in self.payload():
            sha.update(data.data)
        return sha.hexdigest()[:DIGEST]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays in this tree."""
        outlines = (outline for _, node in self.walk() for outline in node.outlines().values())
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in outlines)

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """(path, node) for this node and all below it; paths are "", "codes", "body.codes"."""
        yield path, self
        for key, child in self.children().items():
            yield from child.walk(f"{path}.{key}" if path else key)

    def replace(self, **fields: Any) -> Self:
        return dataclasses.replace(self, **fields)

    def __repr__(self) -> str:
        inside = [repr(child) for child in self.children().values()]
        inside += [f"{key}={value!r}" for key, value in self.settings().items()]
        inside += [f"{str(array.dtype)[6:]}{list(array.shape)}" for array in self.arrays().values()]
        return f"{type(self).__name__}({', '.join(inside)})"


@cache
def defaults_of(kind: Any) -> dict[str, Any]:
    """The fields of a class and their defaults, in order."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def child_names(kind: type[Node]) -> list[str]:
    """The fields that are declared as nodes, in order."""
    return [field.name for field in dataclasses.fields(kind) if str(field.type).startswith(("Form", "Node"))]


def as_bytes(array: Tensor) -> np.ndarray:
    """The array's bytes in row-major order, flat uint8; a view if no copy is needed."""
    return in_bytes(array.detach().cpu().resolve_conj().resolve_neg()).numpy()
