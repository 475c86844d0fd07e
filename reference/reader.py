"""A second reader of .tersor files, by docs/format.md and in its order. No part of Tersor or PyTorch.

read(path)       {name: Array} of the decoded tensors, aliases too, or BadFile with the reason
python reader.py FILE      their names, dtypes, shapes
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
from typing import Any

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
    decoded,
    rounded,
    widened,
)
from streams import BadStream

# 1. The container


def natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def parse(raw: bytes) -> Any:
    """JSON without double keys and without NaN, brackets at most 64 deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(pairs)) == len(pairs), "a key is there twice")
        return dict(pairs)

    def number(digits: str) -> float:
        check(math.isfinite(float(digits)), f"{digits} is not finite")
        return float(digits)

    try:
        text = raw.decode("utf-8")
        depth = 0
        for mark in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if mark in "[{" else -1
            check(depth <= 64, "brackets nest too deep")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half characters
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(f"not JSON: {error}") from None
    return value


def below_31_bits(value: Any) -> bool:
    return natural(value) and value < 2**31


def check_shape(shape: Any) -> tuple[int, ...]:
    fine = isinstance(shape, list) and len(shape) <= 16 and all(natural(n) for n in shape)
    check(fine and math.prod(n for n in shape if n) < 2**62, f"no shape: {shape}")
    return tuple(shape)


def container(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors by name, metadata)."""
    check(len(data) >= 9 and data[8:9] == b"{", "not a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    check(length <= min(100_000_000, len(data) - 8), "the header is cut off")
    header = parse(data[8 : 8 + length])
    check(isinstance(header, dict), "the header is no object")
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
    check([begin for begin, _ in sorted(ranges)] == ends[:-1], "ranges overlap or leave holes")
    check(ends[-1] == len(data) - 8 - length, "bytes are missing, or too many")
    return tensors, metadata


def array(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "bool":
        check(not raw or max(raw) <= 1, "a bool is 0 or 1")
    return Array(dtype, np.frombuffer(raw, NUMPY[dtype]).reshape(shape))


# 2. The metadata, 3. The text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"
# The page's two blocks marked as text: the dictionaries of sections 3 and 11.
BLOCKS = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
DICTIONARY, TINY_DICTIONARY = (block.replace("\n", "").encode() for block in BLOCKS)
KEYS = {"sites", "aliases", "base", "recipe", "ledger"}


def text_of(tensors: dict[str, Array], metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """(the text, the bytes of the small leaves)."""
    check("tersor" in metadata, "a safetensors file, but no .tersor file")
    check(metadata["tersor"] == "1", f"format {metadata['tersor']}; this reader knows 1")
    check(re.fullmatch("[0-9]{1,18}", metadata.get("size", "")) is not None, "no size")
    size, holder = int(metadata["size"]), tensors.get("tersor")
    check(holder is not None and holder.dtype == "uint8" and holder.values.ndim == 1, "no tensor 'tersor'")
    raw = holder.values.tobytes()
    check(2 <= size <= 65536 + 32 * len(raw), "more text than the bytes justify")
    text, small = inflated(raw, size, DICTIONARY)
    check(len(text) == size, "a text of another length")
    check(metadata.get("crc") == f"{zlib.crc32(text):08x}", "the text is damaged")
    return document_of(text, KEYS), small


def inflated(raw: bytes, most: int, dictionary: bytes) -> tuple[bytes, bytes]:
    """(the text, what follows it)."""
    unpacker = zlib.decompressobj(-15, dictionary)
    try:
        text = unpacker.decompress(raw, most)
        rest = unpacker.decompress(unpacker.unconsumed_tail, 1) if not unpacker.eof else b""
    except zlib.error as error:
        raise BadFile(f"deflate: {error}") from None
    check(not rest and unpacker.eof, "a text of another length")
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
    check(8 < len(data) <= 67_108_864, "the short header is of small files")
    body = data[8:]
    check(zlib.crc32(body) == struct.unpack("<I", data[4:8])[0], "damaged")
    text, leaves = inflated(body, 65536 + 32 * len(body), TINY_DICTIONARY)
    return document_of(text, {"sites", "aliases"}), leaves


# 4. Sites

SITE = {"dtype": "float32", "kind": "other", "axis": 0, "groups": 1}


def check_site(site: Any, *, signed: bool = True) -> dict[str, Any]:
    """The site with what was left out."""
    keys = {"form", "shape", "layer", *SITE} | ({"digest"} if signed else set())
    check(isinstance(site, dict) and set(site) <= keys, "unknown keys")
    site = SITE | site
    site["shape"] = check_shape(site.get("shape"))
    check(isinstance(site["dtype"], str) and site["dtype"] in NUMPY, "bad dtype")
    check(
        isinstance(site["kind"], str) and isinstance(site.get("layer", ""), str), "kind and layer are texts"
    )
    check(natural(site["axis"]) and site["axis"] < max(len(site["shape"]), 1), "bad axis")
    check(natural(site["groups"]) and site["groups"] > 0, "bad groups")
    check(not signed or is_digest(site.get("digest")), "bad digest")
    return site


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


# 5. Trees, leaves, and where the bytes are


class Trees:
    """Builds the trees of a file in order, and takes the small leaves as they come."""

    def __init__(self, tensors: dict[str, Array], small: bytes) -> None:
        self.tensors, self.small, self.at, self.used = tensors, small, 0, {"tersor"}

    def build(self, told: Any, shape: Any, dtype: str, site: str, path: tuple[str, ...] = ()) -> Node:
        told = {"form": told} if isinstance(told, str) else told
        check(isinstance(told, dict) and isinstance(told.get("form"), str), f"{site}: no form")
        form = told["form"]
        check(form in CHILDREN and len(path) <= 8, f"{site}: form {form}, or nested too deep")
        name = f"{site}:{'.'.join(path)}" if path else site
        keys, extra = told.keys() - {"form"}, ()
        if form == "coded":
            extra = ("planes", "size", "dtype")
        if form == "dense" and name not in self.tensors:
            extra = ("shape", "dtype")
        check(keys <= {*CHILDREN[form], *SETTINGS[form], *extra}, f"{name}: unknown keys")
        settings = SETTINGS[form] | {key: told[key] for key in SETTINGS[form] if key in told}
        for key, default in SETTINGS[form].items():
            check(type(settings[key]) is type(default), f"{name}: {key}")
            numbers = settings[key] if type(default) is list else [settings[key]]
            check(type(default) in (bool, str) or all(map(below_31_bits, numbers)), f"{name}: {key}")
            check(len(numbers) <= 65_536, f"{name}: {key}")
        check(settings.get("coder", "max") in ("max", "fast", "huffman", "rans"), f"{name}: coder")
        leaf = None
        if form == "dense":
            word = told.get("dtype", dtype)
            check(isinstance(word, str) and word in NUMPY, f"{name}: dtype")
            named = name in self.tensors
            leaf = self.take(name, word, () if named else check_shape(told.get("shape", shape)))
            check(not path or leaf.dtype in CODED, f"{name}: dtype")
        if form == "coded":
            planes, size, word = told.get("planes"), told.get("size", shape), told.get("dtype", dtype)
            check(isinstance(planes, list) and all(map(natural, planes)), f"{name}: planes")
            check(isinstance(word, str) and word in CODED, f"{name}: dtype")
            settings |= {"planes": planes, "size": list(check_shape(size)), "dtype": word}
            leaf = self.take(name, "uint8", (sum(planes),))
            check(leaf.dtype == "uint8" and leaf.values.shape == (sum(planes),), f"{name}: streams")
        children = {}
        for key, aligned in CHILDREN[form].items():
            if key in told:
                inner = shape if aligned else None
                children[key] = self.build(told[key], inner, BY_NAME.get(key, dtype), site, (*path, key))
            else:
                check((form, key) in OPTIONAL, f"{name}: {key} is missing")
        return Node(form, settings, children, leaf)

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """The tensor of this name, or the next small leaf."""
        check(name not in self.used, f"{name}: two leaves")
        self.used.add(name)
        if name in self.tensors:
            return self.tensors[name]
        begin, self.at = self.at, self.at + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        check(self.at <= len(self.small), f"{name}: behind the end of the small leaves")
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


# 8. The ledger

HOW = ("wrap", "refine", "lossless", "absorb")
EDIT, NOTE = {"site", "how", "before", "after"}, {"site", "kind", "text", "data"}


def ledger_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The events one by one, with step, name and digests filled in."""
    recipe, parts = document.get("recipe", {}), document.get("ledger", [])
    check(isinstance(recipe, dict) and isinstance(recipe.get("steps", []), list), "bad recipe")
    check(all(isinstance(step, dict) and len(step) == 1 for step in recipe.get("steps", [])), "bad steps")
    names = [next(iter(step)) for step in recipe.get("steps", [])]
    events: list[dict[str, Any]] = []
    last: dict[str, str] = {}
    step = -1
    check(isinstance(parts, list) and all(isinstance(part, dict) for part in parts), "bad ledger")
    for part in parts:
        check(set(part) <= {"step", "name", "events"}, "ledger: unknown keys")
        step = part.get("step", step + 1)
        check(natural(step), "ledger: step")
        name = part.get("name", names[step] if step < len(names) else None)
        check(isinstance(name, str) and isinstance(part.get("events"), list), "ledger: name or events")
        for event in part["events"]:
            check(isinstance(event, dict), "ledger: an event is an object")
            check(set(event) <= EDIT if "how" in event else set(event) <= NOTE, "ledger: unknown keys")
            event = {"step": step, "name": name, "site": ""} | event
            check(isinstance(event["site"], str), "ledger: site")
            if "how" in event:
                check(event["how"] in HOW, "ledger: how")
                site = document["sites"].get(event["site"], {})
                event |= {"before": event.get("before", last.get(event["site"]))}
                event |= {"after": event.get("after", site.get("digest"))}
                check(is_digest(event["before"]) and is_digest(event["after"]), "ledger: digests")
                last[event["site"]] = event["after"]
            else:
                check(
                    isinstance(event.get("kind"), str) and isinstance(event.get("text"), str), "ledger: note"
                )
                check(isinstance(event.get("data", {}), dict), "ledger: data")
            events.append(event)
    return events


# 9. What a reader takes, and all of it together


def elements(node: Node, shape: tuple[int, ...]) -> int:
    """Elements of all nodes, from what is told; a shape that does not fit is refused when it is decoded."""
    count = math.prod(shape)
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


def read(path: str | Path) -> dict[str, Array]:
    """All tensors of a file, decoded."""
    data = Path(path).read_bytes()
    signed, tensors = data[:4] != MAGIC, {}
    if signed:
        tensors, metadata = container(data)
        document, small = text_of(tensors, metadata)
    else:
        document, small = short(data)
    trees = Trees(tensors, small)
    sites = {name: check_site(site, signed=signed) for name, site in document["sites"].items()}
    nodes = {
        name: trees.build(site.get("form"), list(site["shape"]), site["dtype"], name)
        for name, site in sites.items()
    }
    check(trees.used >= set(tensors), "a tensor that no form uses")
    check(trees.at == len(small), "bytes behind the small leaves")
    claimed = sum(elements(node, shape_of(node)) for node in nodes.values())
    check(claimed <= 16_777_216 + 1024 * len(data), "more elements than the bytes justify")
    found = {}
    for name, site in sites.items():
        check(not signed or digest(nodes[name]) == site["digest"], f"{name}: damaged")
        try:
            value = decoded(nodes[name])
        except BadStream as error:
            raise BadFile(f"{name}: {error}") from None
        check(value.values.shape == site["shape"], f"{name}: shape")
        if value.dtype != site["dtype"]:
            check(value.dtype in FLOATS and site["dtype"] in FLOATS, f"{name}: dtype")
            value = rounded(widened(value), site["dtype"])
        found[name] = value
    aliases = document.get("aliases", {})
    check(isinstance(aliases, dict), "bad aliases")
    for alias, name in aliases.items():
        check(isinstance(name, str) and alias not in sites and name in sites, f"{alias}: an alias of nothing")
        found[alias] = found[name]
    check("base" not in document or is_digest(document["base"]), "bad base")
    ledger_of(document)
    return found


if __name__ == "__main__":
    for name, value in read(sys.argv[1]).items():
        print(name, value.dtype, list(value.values.shape))
