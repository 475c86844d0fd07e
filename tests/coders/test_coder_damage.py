"""Damaged and random streams: both decoders raise an error, or both give the same symbols."""

import numpy as np
import pytest
from coder_cases import make, reference, symbol_streams
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.coders import decode, encode
from tersor.errors import FormatError


def agree(stream: bytes, count: int) -> bool:
    """Check that both decoders give the same symbols or both refuse. True if they accept."""
    try:
        expected = reference.decode(stream, count)
    except reference.BadStream:
        with pytest.raises(FormatError):
            decode(stream, count)
        return False
    decoded = decode(stream, count)
    assert decoded.dtype == np.uint8
    assert (decoded == expected).all()
    return True


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, int]:
    symbols = draw(symbol_streams())[:600]
    coder = draw(st.sampled_from(["fast", "raw", "huffman", "rans"]))
    stream = bytearray(encode(symbols, coder))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(stream), 24 if draw(st.booleans()) else 10**6)))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "add"])):
            case "flip" if at < len(stream):
                stream[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(stream):
                stream[at] = draw(st.integers(0, 255))
            case "cut":
                del stream[at:]
            case "drop":
                del stream[at : at + draw(st.integers(1, 3))]
            case "add":
                stream[at:at] = draw(st.binary(min_size=1, max_size=3))
    return bytes(stream), max(0, len(symbols) + draw(st.sampled_from([0, 0, 0, -1, 1, 7])))


@settings(max_examples=400)
@given(damaged())
def test_damage(case: tuple[bytes, int]) -> None:
    agree(*case)


@settings(max_examples=400)
@given(st.sampled_from([2, 3, 3 + 64, 3 + 128, 3 + 8, 3 + 64 + 24, 3 + 128 + 40]), st.binary(max_size=300))
def test_random_streams(first: int, rest: bytes) -> None:
    for count in (1, 5, 100):
        agree(bytes([first]) + rest, count)


@pytest.mark.parametrize("coder", ["huffman", "rans"])
@pytest.mark.parametrize("kind", ["coin 0.05", "ternary", "normal 30", "pruned"])
def test_every_truncation_is_refused(coder: str, kind: str) -> None:
    stream = encode(make(kind, 400), coder)
    for length in range(len(stream)):
        assert not agree(stream[:length], 400)


@pytest.mark.parametrize("coder", ["raw", "constant", "huffman", "rans"])
def test_extra_bytes_are_refused(coder: str) -> None:
    symbols = make("one symbol" if coder == "constant" else "ternary", 200)
    stream = encode(symbols, coder)
    for more in (b"\0", b"\0\0", b"\xff\xff", b"\0\0\0\0"):
        assert not agree(stream + more, 200)


def test_rans_detects_nearly_every_flipped_bit() -> None:
    symbols = make("normal 30", 2000)
    stream = encode(symbols, "rans")
    missed = 0
    for at in range(8, 8 * len(stream), 7):
        flipped = bytearray(stream)
        flipped[at // 8] ^= 1 << at % 8
        try:
            decode(bytes(flipped), 2000)
            missed += 1
        except FormatError:
            pass
    # Out of 1,992. Exchanging symbols of equal frequency does not change the state.
    assert missed <= 60


@pytest.mark.parametrize(
    ("stream", "count", "says"),
    [
        (b"\x80", 3, "settings 16"),
        (b"\x38", 3, "1 bytes, but 3 raw symbols of 1 bits take 2"),
        (b"\x38\x1f", 3, "not zero"),
        (b"\x01", 3, "a constant has 2 bytes"),
        (b"\x09\x05", 3, "settings 0"),
        (b"\x0a\x05", 3, "huffman with settings 1"),
        (b"\x33\x05", 3, r"2\^6 states"),
        (b"\xc3\x05", 3, "kind 3"),
        (b"\x02\x40\x10\x00", 9, "code space"),
        (b"\x83\x08\x00", 3, "frequency 0"),
        (b"\x83\x0c\x00", 3, "state is missing"),
        (b"\x83\x0c\x00\x01\x00", 3, "highest byte of the state is zero"),
        (b"\x8b\x0c\x00" + b"\0\0\1\0" * 2 + b"\0", 2, "inside a word"),
        (b"\x8b\x0c\x00" + b"\0\0\1\0\0\0\0\1", 3, "damaged"),
        (b"\x8b\x0c\x00" + b"\0\0\1\0\0\0\0\0", 3, "a state of 0"),
        (b"\x8b\x0c\x00" + b"\0\0\1", 3, "inside its 2 states"),
        (b"\x83\x0c\x00\x01", 3, "damaged"),
        (b"\x03\x00\x3f\xe0", 3, "an alphabet of"),
        (b"\x03\x00\x00\x00", 3, "leading zeros"),
        (b"\x03\x08", 3, "ends after 2 bytes, inside its table"),
        (b"\x07\x00", 3, "A newer tersor may read it"),
    ],
)
def test_errors_state_the_reason(stream: bytes, count: int, says: str) -> None:
    assert not agree(stream, count)
    with pytest.raises(FormatError, match=says):
        decode(stream, count)
