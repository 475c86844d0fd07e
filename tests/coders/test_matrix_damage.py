"""Damaged and random streams of the matrix coders: both decoders refuse, or both give the same symbols."""

import numpy as np
import pytest
from coder_cases import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import Case, mixing_streams, predictive_streams

from tersor.coders import decode, encode
from tersor.coders.bit_strings import BitWriter
from tersor.coders.rans.tables import PAIR
from tersor.errors import FormatError

FEW = ((1, 9), (9, 1), (3, 5), (7, 13))
TWO = ((2, 2), (3, 5), (66, 3), (130, 2))


def agree(stream: bytes, case: Case, count: int, width: int) -> bool:
    """Check that both decoders give the same symbols or both refuse. True if they accept."""
    try:
        expected = reference.decode(stream, count, width, case.keep)
    except reference.BadStream:
        with pytest.raises(FormatError):
            decode(stream, count, width=width, keep=case.keep)
        return False
    assert (decode(stream, count, width=width, keep=case.keep) == expected).all()
    return True


@st.composite
def damaged(draw: st.DrawFn, made: tuple[Case, bytes]) -> tuple[bytes, Case, int, int]:
    case, stream = made[0], bytearray(made[1])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(stream), 40 if draw(st.booleans()) else 10**6)))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "drop", "add"])):
            case "flip" if at < len(stream):
                stream[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(stream):
                stream[at] = draw(st.integers(0, 255))
            case "cut":
                del stream[max(at, 1) :]
            case "drop":
                del stream[at : at + draw(st.integers(1, 3))]
            case "add":
                stream[at:at] = draw(st.binary(min_size=1, max_size=3))
    rows = max(1, len(case.symbols) // case.width) + draw(st.sampled_from([0, 0, 0, 0, 1, 64]))
    count = len(case.symbols) if case.keep is not None else rows * case.width
    return bytes(stream or b"\5"), case, count, case.width


@settings(max_examples=150)
@given(mixing_streams(FEW).flatmap(damaged))
def test_mixing(given_: tuple[bytes, Case, int, int]) -> None:
    agree(*given_)


@settings(max_examples=60)
@given(predictive_streams(TWO).flatmap(damaged))
def test_predictive(given_: tuple[bytes, Case, int, int]) -> None:
    agree(*given_)


@settings(max_examples=100)
@given(st.integers(0, 31), st.binary(max_size=80))
def test_random_mixing(first: int, rest: bytes) -> None:
    case = Case(np.zeros(30, np.uint8), 6, None, "invented")
    agree(bytes([5 | first << 3]) + rest, case, 30, 6)


@settings(max_examples=100)
@given(st.integers(0, 10), st.binary(min_size=45, max_size=120))
def test_random_tables(settings_: int, rest: bytes) -> None:
    """Valid levels, then random bytes."""
    levels = b"\2\0\0\0\1\x28" * 2
    case = Case(np.zeros(260, np.uint8), 2, None, "invented")
    agree(bytes([4 | settings_ << 3, 0]) + levels + rest, case, 260, 2)


@pytest.mark.parametrize(("coder", "most"), [("predictive", 0), ("mixing", 6)])
def test_truncations_are_refused(coder: str, most: int) -> None:
    """Truncations are refused, except a few in the last bytes of mixing: they are valid for other symbols."""
    symbols = np.rint(np.random.default_rng(0).normal(0, 9, 4160)).astype(np.int8).view(np.uint8)
    stream = encode(symbols, coder, width=32)
    accepted = 0
    for length in [*range(80), *range(80, len(stream) - 9, 61), *range(len(stream) - 9, len(stream))]:
        try:
            decode(stream[:length], 4160, width=32)
            accepted += 1
        except FormatError:
            pass
    assert accepted <= most
    for more in (b"\0", b"\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(FormatError):
            decode(stream + more, 4160, width=32)


def head(rows: bytes = b"\1\x28", columns: bytes = b"\1\x40", settings_: int = 0) -> bytes:
    """The start of a predictive stream of 3 x 2 codes, up to its tables."""
    parts = [len(part).to_bytes(4, "little") + part for part in (rows, columns)]
    return bytes([4 | settings_ << 3, 0]) + parts[0] + parts[1]


def wide_tables(groups: int) -> bytes:
    """Own tables for some groups: four pairs with 2^16 slots each."""
    bits = BitWriter()
    bits.bits(0, 1)
    for _ in range(groups):
        bits.golomb(0)
        bits.bits(2, 2)
        for _ in range(4):
            for number, width in ((PAIR, 2), (7, 3), (0, 1)):
                bits.bits(number, width)
            bits.golomb(0)
            bits.bits(1, 16)
    return bits.to_bytes()


STATE = b"\0\0\1\0"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (head(settings_=20), "settings 20, but 0 to 19"),
        (head(rows=b"\5\0\0\0\0\0"), "not by a static coder"),
        (head(rows=b""), "empty"),
        (head(rows=b"\1\x80"), "a level of 128"),
        (head()[:4], "bytes of levels"),
        (head() + b"\x7f", "common tables, but their shape is missing"),
        (head() + b"\x80\x60", "inside its table"),
        (head() + wide_tables(17), "own tables of 4456448 slots"),
        (head() + wide_tables(16), "leading zeros"),
        # One run of 64 groups, one table of one symbol: 0 0000001000000 00 11 00000000
        (head() + b"\x01\x00\xc0\x00", "inside its 8 states"),
        (head() + b"\x01\x00\xc0\x00" + STATE * 7 + b"\0\0\0\0", "a state of 0"),
        (head() + b"\x01\x00\xc0\x00" + STATE * 8 + b"\0", "inside a word"),
        (head() + b"\x01\x00\xc0\x00" + STATE * 8 + b"\0\0", "0 of 1 words"),
        (b"\5\0\0\0", "4 bytes of mixing"),
        (b"\5\0\0\0\0" + bytes(99), "damaged"),
    ],
)
def test_errors_state_the_reason(stream: bytes, says: str) -> None:
    case = Case(np.zeros(6, np.uint8), 2, None, "")
    assert not agree(stream, case, 6, 2)
    with pytest.raises(FormatError, match=says):
        decode(stream, 6, width=2)
