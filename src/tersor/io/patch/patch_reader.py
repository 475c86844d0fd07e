"""Patch reader: decodes the arrays of NEW from those of OLD and a patch's streams. docs/format.md section 12.

Elements are counted before they are allocated; the limit follows from the bytes of the patch and of OLD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tersor.dtypes import NAMED
from tersor.encode import coded
from tersor.errors import FormatError
from tersor.forms import PROFILES, Affine, Coded, Dense, LowRank
from tersor.io.form_json import Places
from tersor.io.json_text import Json, deflate, of_type, only
from tersor.io.patch.named_arrays import NamedArrays
from tersor.io.patch.residual import fitted, rebuild
from tersor.io.patch.texts import text_from
from tersor.io.patch.uniform_grids import UniformGrid, movable, regrid
from tersor.io.safetensors_file import bytes_tensor
from tersor.io.validate import limit_for

SAME, CHANGE, ALONE, TEXT = "same", "change", "alone", "text"
HOWS = (SAME, CHANGE, ALONE, TEXT)
KEYS = ("how", "of", "grid", "coder", "keep", "n", "text")
Shape = tuple[int, ...]


class PatchReader:
    """The text and streams of a patch. `read(begin, end)` returns a range of the streams' `nbytes` bytes."""

    def __init__(
        self, text: Json, read: Callable[[int, int], bytes], nbytes: int, before: NamedArrays
    ) -> None:
        self.text, self.read, self.nbytes, self.before = text, read, nbytes, before
        self.room = limit_for(nbytes + before.nbytes)  # elements that may still be declared
        self.parts: Json = of_type(text.get("parts"), dict, "parts")
        self.at: dict[str, tuple[int, list[int]]] = {}
        self.known = set(before.names)
        at = 0
        for name, part in self.parts.items():
            self._check(name, part)
            self.at[name] = at, part.get("n", [])
            at += sum(part.get("n", []))
        if text.get("kind") == "file" or text.get("whole"):
            if self.parts or (text.get("kind") == "file" and len(text) > 2):
                raise FormatError("it carries the new file whole, but states more of it")
        elif at != nbytes:
            raise FormatError(f"its streams have {nbytes:,} bytes, but its parts state {at:,}")

    def _check(self, name: str, part: Any) -> None:
        who = f"{name[:200]}: its part"
        only(of_type(part, dict, who), KEYS, who)
        for key, kind in (
            ("how", str),
            ("of", str),
            ("grid", bool),
            ("coder", str),
            ("keep", str),
            ("n", list),
            ("text", list),
        ):
            of_type(part.get(key, kind()), kind, f"{who}: {key}")
        if part.get("how", CHANGE) not in HOWS:
            raise FormatError(f"{who} has how {part['how'][:20]!r}; known are {', '.join(HOWS)}")
        if part.get("coder", "max") not in PROFILES:
            raise FormatError(f"{who} has coder {part['coder'][:20]!r}; known are {', '.join(PROFILES)}")
        if not all(type(n) is int and n >= 0 for n in part.get("n", [])):
            raise FormatError(f"{who}: n lists the bytes of each stream, not {str(part['n'])[:60]}")
        lengths = part.get("text", [])
        fine = len(lengths) == 3 and all(type(n) is int and 0 <= n < 1 << 62 for n in lengths)
        if (part.get("how") == TEXT) != ("text" in part) or (lengths and not fine):
            raise FormatError(f"{who}: a text has three lengths, not {str(lengths)[:60]}")

    def part(self, name: str) -> Json:
        """The entry of an array. An array without one equals OLD's array of the same name."""
        return self.parts.get(name, {"how": SAME})

    def other(self, name: str) -> str:
        """The name of the OLD array that this one is encoded against."""
        found: str = self.part(name).get("of", name)
        if found not in self.known:
            raise FormatError(f"{name[:200]}: its base {found[:200]!r} is not in {self.before.path}")
        return found

    def count(self, shape: Shape) -> None:
        """Count an array of this shape before it is allocated. FormatError above the limit."""
        self.room -= math.prod(shape)
        if self.room < 0:
            raise FormatError("it declares more elements than its bytes and those of the old file justify")

    def array(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Shape,
        keep: Tensor | None = None,
        grid: Callable[[], UniformGrid] | None = None,
    ) -> Tensor:
        """An array of NEW. `keep`: the mask that hides elements. `grid`: returns the grid of the codes."""
        try:
            self.count(shape)
            found = self._array(name, dtype, shape, keep, grid)
        except FormatError as error:
            message = str(error)
            known = message.startswith(name[:200])
            raise FormatError(message if known else f"{name[:200]}: {message}") from None
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise FormatError(
                f"{name[:200]}: it is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}"
            )
        return found

    def attachment(self, name: str, nbytes: int, *, size: int | None = None) -> Tensor:
        """An attachment as it is stored, or a file beside the weights, of this many bytes; `size`: the bytes
        of its text if it is deflated."""
        part = self.part(name)
        if part.get("how") != TEXT:
            return self.array(name, torch.uint8, (nbytes,))
        stated = nbytes if size is None else size
        if sum(part["text"]) != stated:  # before any of it is inflated
            raise FormatError(f"{name[:200]}: its text has {sum(part['text']):,} bytes, not {stated:,}")
        self.count((max(nbytes, stated),))
        try:
            old = self.before.text(part.get("of", name)) or b""
            data = text_from(part["text"], self._streams(name), old)
        except FormatError as error:
            raise FormatError(f"{name[:200]}: {error}") from None
        data = data if size is None else deflate(data)
        if len(data) != nbytes:
            raise FormatError(
                f"{name[:200]}: it has {len(data):,} bytes, not {nbytes:,}: the patch is damaged, or another "
                "version of tersor made it: use that version"
            )
        return bytes_tensor(data)

    def _array(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Shape,
        keep: Tensor | None,
        grid: Callable[[], UniformGrid] | None,
    ) -> Tensor:
        part = self.part(name)
        how = part.get("how", CHANGE)
        if how == SAME:
            return self.before.array(self.other(name))
        base = None
        if how == TEXT:
            raise FormatError("it is not an attachment, so it has no text")
        if how == CHANGE:
            base = fitted(self.before.array(self.other(name)), shape, dtype)
            if base is None:
                raise FormatError("the old array has another dtype or another number of axes")
        if base is not None and part.get("grid"):
            base = self._regridded(name, base, grid)
        return rebuild(self._streams(name), base, dtype, shape, keep)

    def _regridded(self, name: str, base: Tensor, grid: Callable[[], UniformGrid] | None) -> Tensor:
        old = self.before.leaf(self.other(name)).grid
        new = None if grid is None else grid()
        if old is None or new is None or not movable(base, old, new):
            raise FormatError("it needs a new grid, but it has none or one of another kind")
        return regrid(base, old, new)

    def _streams(self, name: str) -> Iterator[bytes]:
        at, lengths = self.at.get(name, (0, []))
        for begin, end in pairwise(accumulate(lengths, initial=at)):
            yield self.read(begin, end)


class SiteLeaves:
    """The leaves of one site of NEW, decoded and as stored."""

    def __init__(self, reader: PatchReader, places: Places, tree: Any, site: str) -> None:
        self.reader, self.places = reader, places
        self.nodes = dict(nodes_of(tree, site, ""))
        self.order = {name: number for number, name in enumerate(self.nodes)}
        self.arrays: dict[str, Tensor] = {}

    def stored(self, name: str) -> Tensor:
        """The array of a leaf as stored in the file."""
        node, part = self.nodes[name], self.reader.part(name)
        if node["form"] != Coded.name or "coder" in part:
            array = self.array(name)
            return array if node["form"] != Coded.name else self.code(name, array)
        if part.get("how") == SAME:
            return self._stored_before(name)
        place = self.places.found[name]
        return self.reader.array(name, place.dtype, place.shape)

    def code(self, name: str, array: Tensor) -> Tensor:
        """The streams of a coded leaf, coded again with the same profile."""
        again = coded(array, self.mask(name), self.reader.part(name)["coder"])
        if list(again.planes) != self.nodes[name]["planes"]:
            raise FormatError(
                f"{name[:200]}: this version of tersor codes it differently. Use the one that made the patch"
            )
        return again.data

    def array(self, name: str) -> Tensor:
        """A decoded leaf."""
        if name not in self.arrays:
            if name not in self.nodes:
                raise FormatError(f"{name[:200]}: the new file has no such leaf")
            dtype, shape = self.kind(name)
            mask = self.mask(name)
            self.arrays[name] = self.reader.array(name, dtype, shape, mask, lambda: self.grid(name))
        return self.arrays[name]

    def kind(self, name: str) -> tuple[torch.dtype, Shape]:
        node, place = self.nodes[name], self.places.found[name]
        if node["form"] != Coded.name:
            return place.dtype, place.shape
        if not isinstance(node["dtype"], str) or node["dtype"] not in NAMED:
            raise FormatError(f"{name[:200]}: dtype {str(node['dtype'])[:40]!r} is not known")
        return NAMED[node["dtype"]], tuple(node["size"])

    def mask(self, name: str) -> Tensor | None:
        """The mask that hides elements of a leaf; it comes before the leaf."""
        keep = self.reader.part(name).get("keep")
        if keep is None:
            return None
        mask = self.arrays.get(keep)
        if mask is None and keep in self.nodes and self.order[keep] < self.order[name]:
            mask = self.array(keep)
        if mask is None or mask.dtype is not torch.bool or tuple(mask.shape) != self.kind(name)[1]:
            raise FormatError(f"{name[:200]}: {keep[:200]!r} is not its mask")
        return mask

    def grid(self, name: str) -> UniformGrid:
        """The grid of codes; its scale and zero point are arrays of their own."""
        above = name.removesuffix("codes")
        node = self.nodes.get(above)
        if above == name or node is None or node["form"] != Affine.name:
            raise FormatError("it needs a new grid, but it has no codes of a grid")
        if "runs" in node or "member" in node:
            raise FormatError("it needs a new grid, but its groups are not equal")
        group, axis = node.get("group", 0), node.get("axis", 0)
        if type(group) is not int or type(axis) is not int or min(group, axis) < 0:
            raise FormatError(f"group {str(group)[:20]} or axis {str(axis)[:20]} is not a whole number")
        zero = self.table(f"{above}zero") if "zero" in node else None
        scale = self.table(f"{above}scale")
        if not scale.dtype.is_floating_point or scale.ndim != 2:
            raise FormatError("the scale of its grid is not a table of floats")
        return UniformGrid(scale, zero, group, axis)

    def table(self, name: str) -> Tensor:
        """A scale or zero: a leaf, or a product with one term."""
        if name in self.nodes:
            return self.array(name)
        if self.nodes.get(f"{name}.", {}).get("form") != LowRank.name:
            raise FormatError("its new grid is neither a leaf nor a product of leaves")
        left, right = (self.array(f"{name}.{side}") for side in LowRank.inner)
        one = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0] == 1
        if not one or left.dtype != right.dtype or not left.dtype.is_floating_point:
            raise FormatError("the scale of its grid is not a product with one term")
        self.reader.count((left.shape[0], right.shape[1]))
        return LowRank(Dense(left), Dense(right)).decode()

    def _stored_before(self, name: str) -> Tensor:
        old = self.reader.before.leaf(self.reader.other(name)).stored
        place = self.places.found[name]
        self.reader.count(place.shape)
        if not isinstance(old, Coded) or tuple(old.data.shape) != place.shape:
            raise FormatError(f"{name[:200]}: it must be as in the old file, but is stored otherwise there")
        return old.data


def nodes_of(node: Any, site: str, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, node) of each node of a tree, in order. An inner node has the prefix of its leaves as name."""
    if isinstance(node, dict):
        leaf = node.get("form") in (Coded.name, "dense")
        inner = f"{site}:{path}." if path else f"{site}:"
        yield (inner if not leaf else f"{site}:{path}" if path else site), node
        for key, child in node.items():
            yield from nodes_of(child, site, f"{path}.{key}" if path else key)
