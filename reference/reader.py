"""Reader: a second reader of .tersor files, in the order of docs/format.md. Does not use Tersor or PyTorch.

read(path)             returns {name: Array}, decoded tensors and aliases, or raises BadFile with the reason
python reader.py FILE  prints their names, dtypes and shapes
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from formulas import (
    BY_NAME,
    CHILDREN,
    CODED,
    DTYPES,
    FLOATS,
    NUMPY,
    OPTIONAL,
    SETTINGS,
    Array,
    BadFile,
    Node,
    check,
    check_grid,
    decoded,
    rounded,
    widened,
)
from held import attachment_of, check_changes, check_grids, check_site, lists_of
from records import ledger_of
from streams import BadStream
from words import below_31_bits, check_shape, natural, parse

# 1. The container


def container(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors by name, metadata)."""
    check(len(data) >= 9 and data[8:9] == b"{", "not a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    check(length <= min(100_000_000, len(data) - 8), "the header is cut off")
    header = parse(data[8 : 8 + length])
    check(isinstance(header, dict), "the header is not an object")
    metadata = header.pop("__metadata__", {})
    check(isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()), "bad metadata")
    tensors, ranges = {}, []
    for name, entry in header.items():
        check(
            isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, f"{name}: bad entry"
        )
        check(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES, f"{name}: bad dtype")
        offsets = entry["data_offsets"]
        check(
            isinstance(offsets, list) and len(offsets) == 2 and all(map(natural, offsets)), f"{name}: offsets"
        )
        dtype, code = DTYPES[entry["dtype"]]
        shape = check_shape(entry["shape"])
        check(offsets[1] - offsets[0] == math.prod(shape) * np.dtype(code).itemsize, f"{name}: size")
        ranges.append(tuple(offsets))
        check(offsets[1] <= len(data) - 8 - length, "cut off")
        tensors[name] = array(data[8 + length + offsets[0] : 8 + length + offsets[1]], dtype, shape)
    ends = [0, *(end for _, end in sorted(ranges))]
    check([begin for begin, _ in sorted(ranges)] == ends[:-1], "ranges overlap or leave gaps")
    check(ends[-1] == len(data) - 8 - length, "too few or too many bytes")
    return tensors, metadata


def array(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "bool":
        check(not raw or max(raw) <= 1, "a bool must be 0 or 1")
    return Array(dtype, np.frombuffer(raw, NUMPY[dtype]).reshape(shape))


# 2. The metadata, 3. The text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"
# The two blocks of the page that are marked as text are the dictionaries of sections 3 and 11.
BLOCKS = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
DICTIONARY, TINY_DICTIONARY = (block.replace("\n", "").encode() for block in BLOCKS)
SHORT = {"sites", "aliases", "indices", "changes", "grids"}  # keys of a file with the short header
KEYS = SHORT | {"attachments", "base", "past", "recipe", "ledger"}


def text_of(tensors: dict[str, Array], metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """(the text, the bytes of the small leaves)."""
    check("tersor" in metadata, "a safetensors file, but not a .tersor file")
    check(metadata["tersor"] == "1", f"format {metadata['tersor']}, but this reader knows only 1")
    check(re.fullmatch("[0-9]{1,18}", metadata.get("size", "")) is not None, "no size")
    size, holder = int(metadata["size"]), tensors.get("tersor")
    check(holder is not None and holder.dtype == "uint8" and holder.values.ndim == 1, "no tensor 'tersor'")
    raw = holder.values.tobytes()
    check(2 <= size <= 65536 + 32 * len(raw), "more text than the tensor's size allows")
    text, small = inflated(raw, size, DICTIONARY)
    check(len(text) == size, "the text has a wrong length")
    check(metadata.get("crc") == f"{zlib.crc32(text):08x}", "the text is damaged")
    return document_of(text, KEYS), small


def inflated(raw: bytes, most: int, dictionary: bytes) -> tuple[bytes, bytes]:
    """(the text, the bytes after it)."""
    unpacker = zlib.decompressobj(-15, dictionary)
    try:
        text = unpacker.decompress(raw, most)
        rest = unpacker.decompress(unpacker.unconsumed_tail, 1) if not unpacker.eof else b""
    except zlib.error as error:
        raise BadFile(f"deflate: {error}") from None
    check(not rest and unpacker.eof, "the text has a wrong length")
    return text, unpacker.unused_data


def document_of(text: bytes, keys: set[str]) -> dict[str, Any]:
    document = parse(text)
    check(isinstance(document, dict) and set(document) <= keys, "unknown keys")
    check(isinstance(document.get("sites"), dict), "no sites")
    return document


# 11. The short header

MAGIC = bytes.fromhex("54535201")


def short(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(the text, the bytes of the leaves)."""
    check(8 < len(data) <= 67_108_864, "the short header is only for small files")
    body = data[8:]
    check(zlib.crc32(body) == struct.unpack("<I", data[4:8])[0], "damaged")
    text, leaves = inflated(body, 65536 + 32 * len(body), TINY_DICTIONARY)
    return document_of(text, SHORT), leaves


# 5. Trees, leaves, and where the bytes are


class Trees:
    """Builds the trees of a file in order, and reads the small leaves in the same order."""

    def __init__(self, tensors: dict[str, Array], small: bytes) -> None:
        self.tensors, self.small, self.at, self.used = tensors, small, 0, {"tersor"}

    def grid(self, tree: Any, edge: str) -> Node:
        """The grid of an edge, checked except for its values."""
        check(isinstance(tree, dict), f"{edge}: no grid")
        return self.build(tree, None, "", edge, edge=True)

    def build(
        self, tree: Any, shape: Any, dtype: str, site: str, path: tuple[str, ...] = (), *, edge: bool = False
    ) -> Node:
        tree = {"form": tree} if isinstance(tree, str) else tree
        check(isinstance(tree, dict) and isinstance(tree.get("form"), str), f"{site}: no form")
        form = tree["form"]
        check(form in CHILDREN and (form != "grid" or edge), f"{site}: form {form}")
        check(len(path) <= 8 and (form == "grid" or not edge), f"{site}: nested too deep, or no grid")
        name = f"{site}:{'.'.join(path)}" if path else site
        keys, extra = tree.keys() - {"form"}, ()
        if form == "coded":
            extra = ("planes", "size", "dtype")
        if form == "dense" and name not in self.tensors:
            extra = ("shape", "dtype")
        check(keys <= {*CHILDREN[form], *SETTINGS[form], *extra}, f"{name}: unknown keys")
        settings = SETTINGS[form] | {key: tree[key] for key in SETTINGS[form] if key in tree}
        for key, default in SETTINGS[form].items():
            check(type(settings[key]) is type(default), f"{name}: {key}")
            numbers = settings[key] if type(default) is list else [settings[key]]
            check(type(default) in (bool, str) or all(map(below_31_bits, numbers)), f"{name}: {key}")
            check(len(numbers) <= 65_536, f"{name}: {key}")
        check(settings.get("coder", "max") in ("max", "fast", "huffman", "rans"), f"{name}: coder")
        leaf = None
        if form == "dense":
            word = tree.get("dtype", dtype)
            check(isinstance(word, str) and word in NUMPY, f"{name}: dtype")
            named = name in self.tensors
            leaf = self.take(name, word, () if named else check_shape(tree.get("shape", shape)))
            check(not path or leaf.dtype in CODED, f"{name}: dtype")
        if form == "coded":
            planes, size, word = tree.get("planes"), tree.get("size", shape), tree.get("dtype", dtype)
            check(isinstance(planes, list) and all(map(natural, planes)), f"{name}: planes")
            check(isinstance(word, str) and word in CODED, f"{name}: dtype")
            settings |= {"planes": planes, "size": list(check_shape(size)), "dtype": word}
            leaf = self.take(name, "uint8", (sum(planes),))
            check(leaf.dtype == "uint8" and leaf.values.shape == (sum(planes),), f"{name}: streams")
        children = {}
        for key, aligned in CHILDREN[form].items():
            if key in tree:
                inner = shape if aligned else None
                children[key] = self.build(tree[key], inner, BY_NAME.get(key, dtype), site, (*path, key))
            else:
                check((form, key) in OPTIONAL, f"{name}: {key} is missing")
        return Node(form, settings, children, leaf)

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """The tensor with this name, or the next small leaf."""
        check(name not in self.used, f"{name}: two leaves with this name")
        self.used.add(name)
        if name in self.tensors:
            return self.tensors[name]
        begin, self.at = self.at, self.at + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        check(self.at <= len(self.small), f"{name}: beyond the end of the small leaves")
        return array(self.small[begin : self.at], dtype, shape)


# 6. Forms: formulas.py


# 7. Digests


def digest(node: Node) -> str:
    holder = {"dense": "array", "coded": "data"}.get(node.form)
    leaf = node.leaf
    head = {
        "arrays": {holder: ["torch." + leaf.dtype, list(leaf.values.shape)]} if leaf is not None else {},
        "children": {key: digest(child) for key, child in node.children.items()},
        "form": node.form,
        "settings": {k: v for k, v in node.settings.items() if v != SETTINGS[node.form].get(k)},
    }
    sha = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    sha.update(leaf.values.tobytes() if leaf is not None else b"")
    return sha.hexdigest()[:16]


def whole(nodes: dict[str, Node], kept: Any, changes: list[Any], grids: dict[str, Node]) -> str:
    """The digest of a model."""
    text = "\n".join(f"{name} {digest(node)}" for name, node in sorted(nodes.items()))
    if kept or changes or grids:
        keys = {"set": ("module", "attribute", "value"), "replace": ("module", "stock", "settings")}
        named = [[kind.capitalize(), dict(zip(keys[kind], parts, strict=True))] for kind, *parts in changes]
        rest = {"kept": kept, "changes": named, "grids": {edge: digest(grid) for edge, grid in grids.items()}}
        text += json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# 8. The ledger: records.py


# 9. Limits of a reader, and reading a whole file


def elements(node: Node, shape: tuple[int, ...]) -> int:
    """Number of elements of all nodes, from the stated shapes. A wrong shape is refused in decoding."""
    count = math.prod(shape)
    if node.form == "lowrank":  # its multiplications
        sides = [shape_of(node.children[side]) for side in ("left", "right")]
        count += math.prod(sides[0]) * math.prod(sides[1][1:]) // 32
    count += sum(node.settings.get("runs", ()))
    if node.form == "coded":
        at = 0
        for n in node.settings["planes"]:
            slow = bool(node.leaf.values[at : at + 1].tobytes()) and node.leaf.values[at] & 7 == 5
            count += 3 * math.prod(shape) if slow else 0
            at += n
    for child in node.children.values():
        count += elements(child, shape_of(child))
    return count


def shape_of(node: Node) -> tuple[int, ...]:
    if node.form == "dense":
        return node.leaf.values.shape
    if node.form == "coded":
        return tuple(node.settings["size"])
    if node.form == "lowrank":
        return (*shape_of(node.children["left"])[:1], *shape_of(node.children["right"])[1:])
    return shape_of(next(iter(node.children.values())))


class File(NamedTuple):
    """The contents of a file."""

    tensors: dict[str, Array]  # decoded, by site or alias
    kept: dict[str, dict[int, list[int]]]  # for sites that were cut: the indices kept of each axis
    changes: list[Any]
    grids: dict[str, Node]
    attachments: dict[str, bytes]
    events: list[dict[str, Any]]
    ledger: str  # digest of the ledger
    digest: str  # digest of the model, section 7


def read(path: str | Path) -> dict[str, Array]:
    """Decode all tensors of a file."""
    return opened(path).tensors


def opened(path: str | Path) -> File:
    """Read a file and check all of it."""
    data = Path(path).read_bytes()
    signed, tensors = data[:4] != MAGIC, {}
    if signed:
        tensors, metadata = container(data)
        document, small = text_of(tensors, metadata)
    else:
        document, small = short(data)
    trees, lists = Trees(tensors, small), lists_of(document.get("indices", []), len(data))
    sites = {name: check_site(site, lists, signed=signed) for name, site in document["sites"].items()}
    nodes = {
        name: trees.build(site.get("form"), list(site["stored"]), site["dtype"], name)
        for name, site in sites.items()
    }
    changes = document.get("changes", [])
    check_changes(changes)
    edges = check_grids(document.get("grids", {}), sites, signed=signed)
    grids = {edge: trees.grid(grid["form"], edge) for edge, grid in edges.items()}
    attachments = attachments_of(document.get("attachments", {}), trees)
    check(trees.used >= set(tensors), "a tensor that no form uses")
    check(trees.at == len(small), "extra bytes after the small leaves")
    claimed = sum(elements(node, shape_of(node)) for node in nodes.values())
    leaves = [leaf for grid in grids.values() for leaf in grid.children.values()]
    claimed += sum(elements(leaf, shape_of(leaf)) for leaf in leaves)
    check(claimed <= 16_777_216 + 1024 * len(data), "more elements than the file's size allows")
    for name, entry in (sites | edges).items():
        check(not signed or digest((nodes | grids)[name]) == entry["digest"], f"{name}: damaged")
    found = {name: tensor_of(name, site, nodes[name]) for name, site in sites.items()}
    for edge, grid in grids.items():
        safely(edge, check_grid, grid)
    aliases = document.get("aliases", {})
    check(isinstance(aliases, dict), "bad aliases")
    for alias, name in aliases.items():
        check(isinstance(name, str) and alias not in sites and name in sites, f"{alias}: an alias of no site")
        found[alias] = found[name]
    kept = {
        name: {int(axis): lists[number] for axis, number in site["kept"].items()}
        for name, site in sites.items()
        if site["kept"]
    }
    events, ledger = ledger_of(document)
    return File(found, kept, changes, grids, attachments, events, ledger, whole(nodes, kept, changes, grids))


def attachments_of(entries: Any, trees: Trees) -> dict[str, bytes]:
    check(isinstance(entries, dict), "attachments must be an object")
    found = {}
    for name, entry in entries.items():
        check(f"attachment:{name}" not in trees.used, f"{name}: both a leaf and an attachment")
        trees.used.add(f"attachment:{name}")
        found[name] = attachment_of(name, entry, trees.tensors, lambda raw, n: inflated(raw, n, DICTIONARY))
    return found


def tensor_of(name: str, site: dict[str, Any], node: Node) -> Array:
    value = safely(name, decoded, node)
    check(value.values.shape == site["stored"], f"{name}: shape")
    if value.dtype != site["dtype"]:
        check(value.dtype in FLOATS and site["dtype"] in FLOATS, f"{name}: dtype")
        value = rounded(widened(value), site["dtype"])
    return value


def safely(name: str, function: Any, node: Node) -> Any:
    try:
        return function(node)
    except BadStream as error:
        raise BadFile(f"{name}: {error}") from None


if __name__ == "__main__":
    for name, value in read(sys.argv[1]).items():
        print(name, value.dtype, list(value.values.shape))
