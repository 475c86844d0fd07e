"""Patcher: section 12 of docs/format.md, the arrays of the file that a patch makes. Without Tersor or
PyTorch.

patched(OLD, PATCH)    {name: Array}: tensors, or the values of leaves, of the new file

It has no encoder, so it writes no file, and leaves that the patch stores as bytes stay bytes. OLD is a
.tersor file or one .safetensors file. Patches whose new file has exactly the text of OLD are not supported.
The files beside the weights of a new folder, and attachments that the patch codes as texts, are arrays of
their bytes, not deflated.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from formulas import (
    BY_NAME,
    CHILDREN,
    DTYPES,
    NUMPY,
    SETTINGS,
    Array,
    Node,
    check,
    decoded,
    from_rows,
    rounded,
    rows_of,
    spread,
    widened,
)
from held import check_site, lists_of
from reader import DICTIONARY, MAGIC, Trees, container, inflated, short, text_of
from streams import decode
from words import check_shape, parse

MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
PIECE, LEAST = 4_194_304, 4096


class Old(NamedTuple):
    """The old file."""

    head: bytes
    values: dict[str, Array]  # decoded arrays by name
    bytes: dict[str, Array]  # the stored bytes of coded leaves
    nodes: dict[str, Node]  # the parent node of each leaf, by the leaf's name
    texts: dict[str, bytes]  # inflated attachments
    plain: bool = False  # whether it is a .safetensors: the head is its header


def read_old(data: bytes) -> Old:
    tiny = data[:4] == MAGIC
    tensors, metadata = ({}, {"tersor": "1"}) if tiny else container(data)
    if "tersor" not in metadata:
        return Old(data[8 : 8 + int.from_bytes(data[:8], "little")], tensors, {}, {}, {}, True)
    document, small = short(data) if tiny else text_of(tensors, metadata)
    trees, old = Trees(tensors, small), Old(compact(document), {}, {}, {}, {})
    lists = lists_of(document.get("indices", []), len(data))
    for name, site in document["sites"].items():
        site = check_site(site, lists, signed=not tiny)
        walk(old, trees.build(site["form"], list(site["stored"]), site["dtype"], name), name)
    for edge, grid in document.get("grids", {}).items():
        walk(old, trees.grid(grid["form"], edge), edge)
    for name, entry in document.get("attachments", {}).items():
        full = f"attachment:{name}"
        old.values[full], data = tensors[full], tensors[full].values.tobytes()
        old.texts[full] = inflated(data, entry["nbytes"], DICTIONARY)[0] if entry.get("deflated") else data
    return old


def compact(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def walk(old: Old, node: Node, name: str, keep: np.ndarray | None = None, above: Node | None = None) -> None:
    """Record the leaves below a node. `keep` is the mask above it."""
    if node.leaf is not None:
        old.values[name] = decoded(node, keep if node.settings.get("kept") else None)
        if node.form == "coded":
            old.bytes[name] = node.leaf
        if above is not None:
            old.nodes[name] = above
    for key, child in node.children.items():
        below = keep if CHILDREN[node.form][key] else None
        if node.form == "masked" and key == "body":
            mask = decoded(node.children["keep"], keep).values
            below = mask if below is None else mask & below
        walk(old, child, below_name(name, key, above is None), below, node)


def below_name(name: str, key: str, root: bool) -> str:
    return f"{name}{':' if root else '.'}{key}"


class Leaf(NamedTuple):
    """A leaf of the new file."""

    dtype: str  # of its value
    shape: tuple[int, ...]
    stored: int | None  # bytes, if it is coded
    above: dict[str, Any]  # its parent node


class Place(NamedTuple):
    """Properties that a node inherits from its position in the tree: section 5."""

    name: str
    shape: Any
    dtype: str
    above: dict[str, Any] | None = None


def leaves(tree: Any, place: Place, large: dict[str, Any]) -> Iterator[tuple[str, Leaf]]:
    """The leaves of a tree of the new file."""
    tree = {"form": tree} if isinstance(tree, str) else tree
    name, shape, dtype, above = place
    if tree["form"] == "coded":
        size = check_shape(tree.get("size", shape))
        yield name, Leaf(tree.get("dtype", dtype), size, sum(tree["planes"]), above or {})
    elif tree["form"] == "dense":
        kind, size = large.get(name, (tree.get("dtype", dtype), tree.get("shape", shape)))
        yield name, Leaf(kind, check_shape(size), None, above or {})
    for key, aligned in CHILDREN[tree["form"]].items():
        if key in tree:
            inner = Place(
                below_name(name, key, above is None),
                shape if aligned else None,
                BY_NAME.get(key, dtype),
                tree,
            )
            yield from leaves(tree[key], inner, large)


class Patch:
    """A patch, and the arrays decoded so far."""

    def __init__(self, path: Path, old_path: Path) -> None:
        tensors, metadata = container(path.read_bytes())
        check(metadata.get("tersor-patch") == "1", "not a patch of format 1")
        check(
            metadata["old"] == hashlib.sha256(old_path.read_bytes()).hexdigest(),
            "not the old file of the patch",
        )
        self.old, self.nbytes = read_old(old_path.read_bytes()), old_path.stat().st_size
        text, _ = inflated(
            tensors["patch"].values.tobytes(), int(metadata["size"]), DICTIONARY + self.old.head
        )
        self.streams = tensors["streams"].values.tobytes()
        check(metadata["crc"] == f"{zlib.crc32(text):08x}{zlib.crc32(self.streams):08x}", "damaged")
        self.text = parse(text)
        self.at, end = {}, 0
        for name, part in self.text["parts"].items():
            self.at[name], end = end, end + sum(part.get("n", []))
        whole = self.text["kind"] == "file" or self.text.get("whole", False)
        check(end == len(self.streams) or whole, "the streams have a wrong length")
        self.leaves: dict[str, Leaf] = {}
        self.values: dict[str, Array] = {}

    def arrays(self) -> dict[str, Array]:
        if self.text["kind"] == "file":
            check(not self.text["parts"], "a file that is carried as it is has no parts")
            return read_old(self.streams).values
        if self.text["kind"] == "folder":
            check(not self.text.get("whole"), "a folder that is carried as it is has no arrays")
            found = {}
            for head in self.text["files"].values():
                check(head != "" or self.old.plain, "the header is not in the old file")
                found |= self.tensors(head.encode() or self.old.head)
            for name, entry in self.text["others"].items():
                full = f"attachment:{name}"
                self.leaves[full] = Leaf("uint8", (entry["nbytes"],), None, {})
                found[full] = self.value(full)
                digest = hashlib.sha256(found[full].values.tobytes()).hexdigest()
                check(digest == entry["sha256"], f"{name}: not the new file")
            return found
        if self.text["kind"] == "safetensors":
            return self.tensors(self.text["head"].encode() if "head" in self.text else self.old.head)
        large = self.text["large"]  # present whenever "text" is
        text, nbytes = self.text["text"], len(self.streams) + self.nbytes
        lists = lists_of(text.get("indices", []), nbytes)
        for name, site in text["sites"].items():
            site = check_site(site, lists, signed=not self.text.get("tiny", False))
            self.leaves |= leaves(site["form"], Place(name, list(site["stored"]), site["dtype"]), large)
        for edge, grid in text.get("grids", {}).items():
            self.leaves |= leaves(grid["form"], Place(edge, None, ""), large)
        for name in text.get("attachments", {}):
            dtype, shape = large[f"attachment:{name}"]
            self.leaves[f"attachment:{name}"] = Leaf(dtype, tuple(shape), None, {})
        return {name: self.value(name) for name in self.leaves}

    def tensors(self, head: bytes) -> dict[str, Array]:
        """The tensors of a safetensors file with this header."""
        header = parse(head)
        header.pop("__metadata__", None)
        aliases = self.text.get("aliases", {})
        for name, entry in header.items():
            kind = Leaf(DTYPES[entry["dtype"]][0], tuple(entry["shape"]), None, {})
            self.leaves[aliases.get(name, name)] = kind
        return {name: self.value(aliases.get(name, name)) for name in header}

    def value(self, name: str) -> Array:
        if name not in self.values:
            self.values[name] = self.decode_part(
                name, self.text["parts"].get(name, {"how": "same"}), self.leaves[name]
            )
        return self.values[name]

    def decode_part(self, name: str, part: dict[str, Any], leaf: Leaf) -> Array:
        how, other = part.get("how", "change"), part.get("of", name)
        if leaf.stored is not None and "coder" not in part:
            if how == "same":  # the stored bytes are the same, so the value is the same
                return self.old.values[other]
            leaf = Leaf("uint8", (leaf.stored,), None, {})
        if how == "same":
            return self.old.values[other]
        if how == "text":
            data = text_bytes(part["text"], self.parted(name, part), self.old.texts.get(other, b""))
            return Array("uint8", np.frombuffer(data, np.uint8))
        keep = self.value(part["keep"]).values.reshape(-1) if "keep" in part else None
        base = None if how == "alone" else fitted(self.old.values[other], leaf)
        if base is not None and part.get("grid"):
            base = self.moved(name, base, self.old.nodes[other], leaf)
        words = rebuilt(iter(self.parted(name, part)), base, keep, leaf)
        return Array(leaf.dtype, words.view(NUMPY[leaf.dtype]).reshape(leaf.shape))

    def parted(self, name: str, part: dict[str, Any]) -> list[bytes]:
        """The streams of a part."""
        begin, streams = self.at[name], []
        for n in part.get("n", []):
            streams.append(self.streams[begin : begin + n])
            begin += n
        return streams

    def table(self, name: str, node: Any) -> Array:
        """A scale or zero of NEW: a leaf, or a product of leaves with one term."""
        if name in self.leaves:
            return self.value(name)
        check(node["form"] == "lowrank", "its scale is neither a leaf nor a product")
        sides = [self.value(f"{name}.{side}") for side in ("left", "right")]
        check(sides[0].values.shape[1] == 1, "its scale is a product with several terms")
        return rounded(widened(sides[0]) * widened(sides[1]), sides[0].dtype)

    def moved(self, name: str, codes: Array, old: Node, leaf: Leaf) -> Array:
        """The old codes, rounded to the new grid."""
        stem, settings = name.removesuffix("codes"), SETTINGS["affine"] | leaf.above
        even = not (settings["runs"] or old.settings["runs"] or "member" in (*leaf.above, *old.children))
        check(even, "its groups are not even")
        rows = rows_of(codes, settings["axis"])
        was = {key: decoded(child) for key, child in old.children.items() if key != "codes"}
        now = {key: self.table(stem + key, leaf.above[key]) for key in ("scale", "zero") if key in leaf.above}
        wide = []
        for tables, group in ((was, old.settings["group"]), (now, settings["group"])):
            for key in ("scale", "zero"):
                full = (
                    widened(spread(tables[key], rows.values.shape, group)) if key in tables else np.zeros(1)
                )
                wide.append(full.astype(np.float64))
        with np.errstate(all="ignore"):
            found = np.rint((rows.values - wide[1]) * wide[0] / wide[2] + wide[3])
        limits = np.iinfo(NUMPY[codes.dtype])
        found = np.clip(np.nan_to_num(found, nan=0.0), limits.min, limits.max).astype(NUMPY[codes.dtype])
        return from_rows(Array(codes.dtype, found), codes.values.shape, settings["axis"])


def text_bytes(lengths: list[int], streams: list[bytes], old: bytes) -> bytes:
    """A text of NEW: the first bytes of OLD's, a middle in blocks, the last bytes of OLD's."""
    first, size, last = lengths
    check(first + last <= len(old), "the text takes more of the old one than there is")
    middle, replaced = b"", old[first : len(old) - last]
    for stream in streams:
        centre = (len(middle) + 4096) * len(replaced) // size
        begin = max(0, min(centre - 12_288, len(replaced) - 24_576))
        window = replaced[begin : begin + 24_576]
        most = 32_256 - len(window)
        middle += zlib.decompressobj(-15, zdict=window + middle[max(0, len(middle) - most) :]).decompress(
            stream
        )
    check(len(middle) == size, "the text has a wrong length")
    return old[:first] + middle + old[len(old) - last :]


def fitted(old: Array, leaf: Leaf) -> Array:
    """The old array, cut or padded with zeros to the new shape."""
    if old.dtype != leaf.dtype:
        old = rounded(widened(old), leaf.dtype)
    base = np.zeros(leaf.shape, NUMPY[leaf.dtype])
    both = tuple(slice(0, min(a, b)) for a, b in zip(old.values.shape, leaf.shape, strict=True))
    base[both] = old.values[both]
    return Array(leaf.dtype, base)


def rebuilt(streams: Iterator[bytes], base: Array | None, keep: np.ndarray | None, leaf: Leaf) -> np.ndarray:
    """The elements as unsigned integers."""
    size, count = np.dtype(NUMPY[leaf.dtype]).itemsize, math.prod(leaf.shape)
    flat = np.zeros(count, f"<u{size}")
    keep = np.ones(count, bool) if keep is None else keep
    theirs = None if base is None else np.ascontiguousarray(base.values).reshape(-1).view(f"<u{size}")
    if size == 1:
        width = math.prod(leaf.shape[1:]) if len(leaf.shape) > 1 else 0
        for where in (keep,) if theirs is None else (keep & (theirs == 0), keep & (theirs != 0)):
            mask = None if theirs is None and keep.all() else where
            step = decode(next(streams), int(where.sum()), width, mask)
            flat[where] = step if theirs is None else theirs[where] + step
        return flat
    floats, mine = leaf.dtype in MANTISSA, np.zeros(int(keep.sum()), flat.dtype)
    before = None if theirs is None else theirs[keep]
    for at in range(0, len(mine), PIECE):
        piece = slice(at, at + PIECE)
        if before is None:
            word = joined(streams, len(mine[piece]), flat.dtype)
            mine[piece] = word >> 1 | word << 8 * size - 1 if floats else word
            continue
        words = ordered(before[piece], floats)
        for group in groups(before[piece], leaf.dtype):
            step = joined(streams, len(group), flat.dtype)
            words[group] += np.where(step & 1, ~(step >> 1), step >> 1)
        mine[piece] = disordered(words, floats)
    flat[keep] = mine
    return flat


def joined(streams: Iterator[bytes], count: int, dtype: np.dtype) -> np.ndarray:
    planes = [decode(next(streams), count) for _ in range(dtype.itemsize)]
    return np.stack(planes, axis=1).reshape(-1).view(dtype)


def groups(words: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    if dtype in MANTISSA:
        classes = (words >> MANTISSA[dtype]) & ((1 << 8 * words.itemsize - 1 - MANTISSA[dtype]) - 1)
    else:
        classes = words != 0
    group: list[np.ndarray] = []
    left = len(words)
    for value in np.unique(classes):
        group.append(np.flatnonzero(classes == value))
        left -= len(group[-1])
        if sum(map(len, group)) >= LEAST and left >= LEAST:
            yield np.concatenate(group)
            group = []
    if group:
        yield np.concatenate(group)


def ordered(words: np.ndarray, floats: bool) -> np.ndarray:
    sign = words >> 8 * words.itemsize - 1
    return np.where(sign == 1, ~words, words | (1 << 8 * words.itemsize - 1)) if floats else words.copy()


def disordered(words: np.ndarray, floats: bool) -> np.ndarray:
    top = words.dtype.type(1) << (8 * words.itemsize - 1)
    return np.where(words & top, words ^ top, ~words) if floats else words


def patched(old: str | Path, patch: str | Path) -> dict[str, Array]:
    """The arrays of the new file, from the old file and the patch."""
    return Patch(Path(patch), Path(old)).arrays()


if __name__ == "__main__":
    for name, value in patched(sys.argv[1], sys.argv[2]).items():
        print(name, value.dtype, list(value.values.shape))
