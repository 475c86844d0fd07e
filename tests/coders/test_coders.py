"""encode and decode: round trips with every coder, the choice of a coder, and errors."""

import subprocess
import sys

import numpy as np
import pytest
from coder_cases import KINDS, make, reference, symbol_streams
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import CODERS, coder_of, decode, encode, order0_bits
from tersor.errors import FormatError, SettingError


def able(symbols: np.ndarray) -> list[str]:
    """The coders that can code these symbols."""
    return [name for name in CODERS if name != "constant" or len(set(symbols.tolist())) < 2]


@given(symbol_streams())
def test_every_coder_round_trips(symbols: np.ndarray) -> None:
    for name in able(symbols):
        stream = encode(symbols, name)
        assert decode(stream, len(symbols)).tolist() == symbols.tolist()
        assert reference.decode(stream, len(symbols)).tolist() == symbols.tolist()


@given(symbol_streams())
def test_auto_is_the_shortest(symbols: np.ndarray) -> None:
    stream = encode(symbols)
    assert stream == encode(symbols)
    assert len(stream) == min(len(encode(symbols, name)) for name in able(symbols))
    assert decode(stream, len(symbols)).tolist() == symbols.tolist()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coder", ["raw", "huffman", "rans"])
def test_long_streams(kind: str, coder: str) -> None:
    symbols = make(kind, 65537)
    stream = encode(symbols, coder)
    decoded = decode(stream, 65537)
    assert decoded.dtype == np.uint8
    assert (decoded == symbols).all()
    assert (reference.decode(stream, 65537) == symbols).all()


@given(symbol_streams())
def test_plans_predict_the_size(symbols: np.ndarray) -> None:
    counts = np.bincount(symbols, minlength=256)
    for name, coder in CODERS.items():
        if len(symbols) and (plan := coder.plan(counts)):
            length = len(plan.write(symbols))
            assert plan.nbytes <= length
            assert length <= plan.nbytes * 1.005 + (60 if name == "rans" else 0)
            assert name == "rans" or length == plan.nbytes


def test_sizes_of_the_simplest_streams() -> None:
    assert encode(np.zeros(0, dtype=np.uint8)) == b"\0"
    assert len(encode(np.full(1000, 200, dtype=np.uint8))) == 2
    assert len(encode(make("4 bits", 1000), "raw")) == 501
    assert len(encode(make("any", 1001), "raw")) == 1002


def test_coder_of() -> None:
    symbols = make("ternary", 100)
    assert [coder_of(encode(symbols, name)) for name in ("raw", "huffman", "rans")] == [
        "raw",
        "huffman",
        "rans",
    ]
    assert coder_of(encode(np.full(9, 3, dtype=np.uint8))) == "constant"
    # Coders that need two symbols fall back to a constant.
    assert coder_of(encode(np.full(9, 3, dtype=np.uint8), "rans")) == "constant"
    with pytest.raises(FormatError, match="coder 7 is unknown"):
        coder_of(b"\x07abc")
    with pytest.raises(FormatError, match="empty"):
        coder_of(b"")


def test_streams_may_be_arrays() -> None:
    symbols = make("normal 30", 500)
    stream = np.frombuffer(encode(symbols), dtype=np.uint8)
    assert (decode(stream, 500) == symbols).all()
    assert (decode(np.repeat(stream, 2)[::2], 500) == symbols).all()
    assert encode(np.repeat(symbols, 2)[::2]) == encode(symbols)
    assert decode(stream, 500).flags.writeable
    assert decode(encode(symbols, "raw"), 500).flags.writeable
    with pytest.raises(FormatError, match="int64"):
        decode(stream.astype(np.int64), 500)


@pytest.mark.parametrize(
    ("symbols", "coder", "says"),
    [
        (np.zeros(3, np.int8), "fast", "int8"),
        (np.zeros((3, 2), np.uint8), "fast", r"\[3, 2\]"),
        (np.zeros(3, np.uint8), "huffmann", "did you mean \"?'?huffman"),
        (np.arange(3, dtype=np.uint8), "constant", "3 different"),
    ],
)
def test_wrong_arguments_are_refused(symbols: np.ndarray, coder: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        encode(symbols, coder)


@pytest.mark.parametrize(
    ("coder", "counts"),
    [
        ("raw", [-1, 0, 1, 50, 150, 10**6, 10**15]),
        ("huffman", [-1, 0, 1, 50, 150, 10**6, 10**15]),  # the padding can look like one more symbol
        ("rans", [-1, 0, 1, 50, 99, 101, 102, 150, 10**6]),  # a larger count would allocate its memory
    ],
)
def test_a_wrong_count_is_refused(coder: str, counts: list[int]) -> None:
    stream = encode(make("ternary", 100), coder)
    for count in counts:
        with pytest.raises(FormatError):
            decode(stream, count)


@given(st.integers(1, 10**6), st.integers(0, 255))
def test_constants_fill_the_count(count: int, symbol: int) -> None:
    decoded = decode(bytes([1, symbol]), count)
    assert len(decoded) == count
    assert (decoded == symbol).all()


@given(symbol_streams())
def test_order0_bits(symbols: np.ndarray) -> None:
    share = np.unique(symbols, return_counts=True)[1] / max(len(symbols), 1)
    slow = -len(symbols) * sum(float(p) * np.log2(float(p)) for p in share)
    assert order0_bits(symbols) == pytest.approx(slow, rel=1e-9, abs=1e-6)


def test_numba_is_imported_on_first_use() -> None:
    """The import of the package, and streams without compiled loops, do not import numba."""
    code = (
        "import sys, numpy as np; from tersor.coders import encode, decode\n"
        "decode(encode(np.zeros(5, np.uint8)), 5); decode(encode(np.arange(5, dtype=np.uint8), 'raw'), 5)\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
