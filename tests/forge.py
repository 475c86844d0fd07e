"""Files taken apart and put together again by hand, for tests that need a file no writer would write.

Own code over struct, json and zlib, with the second reader of reference/: nothing of tersor.io.
"""

import copy
import json
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "reference"))

import held  # noqa: E402
import reader as reference  # noqa: E402

Json = dict[str, Any]
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


@dataclass
class Pieces:
    """What a file is made of."""

    document: Json  # the text
    tensors: dict[str, tuple[str, list[int], bytes]] = field(default_factory=dict)  # dtype, shape, bytes
    small: bytes = b""  # the small leaves
    metadata: dict[str, str] = field(default_factory=dict)  # in place of what follows from the text
    tiny: bool = False  # with the short header

    def add(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        self.tensors[name] = (dtype, shape, data)

    def sign(self) -> "Pieces":
        """Put in the digest of each site and grid, so that a forged tree is not refused as damaged."""
        arrays = {
            name: reference.array(data, reference.DTYPES[dtype][0], tuple(shape))
            for name, (dtype, shape, data) in self.tensors.items()
        }
        trees = reference.Trees(arrays, self.small)
        lists = held.lists_of(self.document.get("indices", []), 0)
        for name, site in self.document["sites"].items():
            shape = list(held.stored(tuple(site["shape"]), site.get("kept", {}), lists))
            self._put(site, trees.build(site["form"], shape, site.get("dtype", "float32"), name))
        for edge, grid in self.document.get("grids", {}).items():
            self._put(grid, trees.grid(grid["form"], edge))
        return self

    def _put(self, told: Json, root: Any) -> None:
        told["digest"] = reference.digest(root)
        if self.tiny:
            del told["digest"]

    def sign_by(self, digest: str) -> "Pieces":
        """A digest that is no one's, for files that are refused before it counts."""
        for site in self.document["sites"].values():
            site["digest"] = digest
        return self

    def bytes(self) -> bytes:
        text = json.dumps(self.document, separators=(",", ":"), ensure_ascii=False).encode()
        return self.with_text(text)

    def with_text(self, text: bytes) -> bytes:
        """The file with this text, whatever it says."""
        words = reference.TINY_DICTIONARY if self.tiny else reference.DICTIONARY
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, words)
        data = packer.compress(text) + packer.flush() + self.small
        if self.tiny:
            return tiny_file(data)
        metadata = {"tersor": "1", "size": str(len(text)), "crc": f"{zlib.crc32(text):08x}"} | self.metadata
        tensors = self.tensors | {"tersor": ("U8", [len(data)], data)}
        return safetensors_file(tensors, metadata)


def tiny_file(body: bytes) -> bytes:
    return reference.MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def safetensors_file(
    tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None
) -> bytes:
    header: Json = {"__metadata__": metadata} if metadata is not None else {}
    payload = b""
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: -SIZES[item[1][0]]):
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(payload), len(payload) + len(data)],
        }
        payload += data
    return with_header(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(), payload)


def with_header(header: bytes, payload: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload


def header_of(data: bytes) -> tuple[Json, bytes]:
    """(header, payload)."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def take_apart(data: bytes) -> Pieces:
    if data[:4] == reference.MAGIC:
        unpacker = zlib.decompressobj(-15, reference.TINY_DICTIONARY)
        text = unpacker.decompress(data[8:])
        return Pieces(json.loads(text), {}, unpacker.unused_data, tiny=True)
    header, payload = header_of(data)
    header.pop("__metadata__")
    tensors = {
        name: (entry["dtype"], entry["shape"], payload[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    unpacker = zlib.decompressobj(-15, reference.DICTIONARY)
    text = unpacker.decompress(tensors.pop("tersor")[2])
    return Pieces(json.loads(text), tensors, unpacker.unused_data)


def one_site(form: Any, shape: list[int], small: bytes = b"", **facts: Any) -> Pieces:
    """A file of one site, w."""
    return Pieces({"sites": {"w": {"shape": shape, "digest": "0" * 16, "form": form, **facts}}}, small=small)


def plain(dtype: str, shape: list[int]) -> Json:
    """A small dense leaf that tells everything."""
    return {"form": "dense", "dtype": dtype, "shape": shape}


def constant(shape: list[int], dtype: str = "uint8", planes: int = 1, **facts: Any) -> Json:
    """A coded leaf of constant streams, 2 bytes a plane."""
    return {"form": "coded", "planes": [2] * planes, "size": shape, "dtype": dtype, **facts}


def constant_bytes(symbol: int, planes: int = 1) -> bytes:
    return bytes([1, symbol]) * planes


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def changed(pieces: Pieces, **document: Any) -> Pieces:
    """A copy with other keys in its text."""
    other = copy.deepcopy(pieces)
    other.document |= document
    return other
