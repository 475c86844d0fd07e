"""Golden streams: the format does not change. The examples of docs/streams.md, and each kind of table."""

import json
import re

import numpy as np
import pytest
from coder_cases import ROOT, reference

from tersor.coders import coder_of, decode, encode

# Stream and symbols in hex. Encoders may write other streams; decoders must always read these.
GOLDEN = {
    "huffman, lengths up to 15 as differences, every third symbol": (
        "02b212b6db6db6db6f2217fffffffffefffffff2fffdbe00",
        "64676a918e648b8291",
    ),
    "rans, pair that wraps around, P = 16, 8 lanes": (
        "9bfff261a800b03c060090d00500b03c0100b03c0100b03c0100b03c0100b03c0100b03c0100",
        "ff03ffffffffffff03ff",
    ),
    "rans, list of detail 3 with gaps, 2 lanes": (
        "0b2d2c06131e80fdc00dd802001b669e9f8a23",
        "000506c8050500060605050505c8060500",
    ),
    "rans, list of detail 7 that wraps around": ("031feeef33c6b201b63320834f3cef", "000001fffe0002000001"),
    "rans, shape with bend": (
        "437f01104002a8b0838404351b2e23b461a7401595",
        "fdfbff020500fefd030701fbfc0601f900fbfdfefd0200fe",
    ),
    "rans, shape with slope and peak, P = 16, 4 lanes": (
        "53fe21f8794004784034970200e9ea31059e2a0d0083688f2660ed837e5683ec31",
        "0005fd0005f300e80000fcfe00fefb00000400fe040000fd",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    stream, symbols = (bytes.fromhex(text) for text in GOLDEN[name])
    assert decode(stream, len(symbols)).tobytes() == symbols
    assert reference.decode(stream, len(symbols)).tobytes() == symbols
    assert coder_of(stream) == name.split(",", maxsplit=1)[0]


# The same for the matrix coders; `keep` is the mask, with eight elements in a byte.
MATRIX = json.loads((ROOT / "tests" / "coders" / "golden_matrix.json").read_text())


@pytest.mark.parametrize("name", MATRIX)
def test_golden_matrix(name: str) -> None:
    stream, symbols = bytes.fromhex(MATRIX[name]["stream"]), bytes.fromhex(MATRIX[name]["symbols"])
    width, keep = MATRIX[name]["width"], None
    if "keep" in MATRIX[name]:
        keep = np.unpackbits(np.frombuffer(bytes.fromhex(MATRIX[name]["keep"]), np.uint8)).astype(bool)
    assert decode(stream, len(symbols), width=width, keep=keep).tobytes() == symbols
    assert reference.decode(stream, len(symbols), width, keep).tobytes() == symbols
    assert coder_of(stream) == name.split(",", maxsplit=1)[0]


def test_golden_pieces() -> None:
    """32768 symbols 7 and 5 symbols 9: each piece is a constant."""
    stream = bytes.fromhex("06e0008001070109")
    symbols = np.repeat(np.array([7, 9], np.uint8), [32768, 5])
    assert (decode(stream, 32773) == symbols).all()
    assert (reference.decode(stream, 32773) == symbols).all()
    assert coder_of(stream) == "pieces"


def examples() -> list[tuple[bytes, np.ndarray]]:
    page = (ROOT / "docs" / "streams.md").read_text()
    found = []
    for stream, count, symbols in re.findall(
        r"^\| `([0-9a-f ]+)` \| (\d+) \| ([\d -]+) \|", page, re.MULTILINE
    ):
        values = np.array(symbols.replace("-", "").split(), dtype=np.uint8)
        assert len(values) == int(count)
        found.append((bytes.fromhex(stream), values))
    return found


def test_examples_of_the_page() -> None:
    assert len(examples()) == 7
    for stream, symbols in examples():
        assert decode(stream, len(symbols)).tolist() == symbols.tolist()
        assert reference.decode(stream, len(symbols)).tolist() == symbols.tolist()
        assert encode(symbols, coder_of(stream)) == stream
