"""Codes of numbers, lists and alphabets: round trips, and lengths as planned."""

import numpy as np
import pytest
from coder_cases import static_reference as reference
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders.alphabet import alphabets, read_alphabet, write_alphabet
from tersor.coders.bit_strings import BitReader, BitWriter, list_bits, read_list, write_list
from tersor.errors import FormatError


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 7))))
def test_golomb(pairs: list[tuple[int, int]]) -> None:
    out = BitWriter()
    for number, order in pairs:
        before = out.length
        out.golomb(number, order)
        assert out.length - before == 2 * int(np.log2((number >> order) + 1)) + 1 + order
    source, second = BitReader(out.to_bytes()), reference.Bits(out.to_bytes(), 0)
    for number, order in pairs:
        assert source.golomb(order) == second.g(order) == number
    assert source.byte_end() == second.padding() == len(out.to_bytes())


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 7), st.integers(0, 127))))
def test_rice(triples: list[tuple[int, int, int]]) -> None:
    numbers = [(high << order | low & ((1 << order) - 1), order) for high, order, low in triples]
    out = BitWriter()
    for number, order in numbers:
        before = out.length
        out.rice(number, order)
        assert out.length - before == (number >> order) + 1 + order
    second = reference.Bits(out.to_bytes(), 0)
    for number, order in numbers:
        assert second.r(order) == number


@given(st.lists(st.integers(0, 2560), min_size=1, max_size=256), st.integers(0, 5))
def test_lists(numbers: list[int], calm: int) -> None:
    values = np.array(numbers) >> calm
    out = BitWriter()
    write_list(out, values)
    assert out.length == list_bits(values).min()
    assert read_list(BitReader(out.to_bytes()), len(values), 2560).tolist() == values.tolist()
    assert reference.Bits(out.to_bytes(), 0).list(len(values), 2560) == values.tolist()
    with pytest.raises(FormatError):
        read_list(BitReader(out.to_bytes()), len(values), int(values.max()) - 1)


def test_long_codes_are_refused() -> None:
    with pytest.raises(FormatError, match="leading zeros"):
        BitReader(bytes(9)).golomb()
    with pytest.raises(FormatError, match="no list of 1 numbers"):  # a list in a Rice code, all ones
        read_list(BitReader(b"\x07" + b"\xff" * 9), 1, 2560)
    with pytest.raises(FormatError, match="ends after 1 bytes"):
        BitReader(b"\0").bits(9)
    source = BitReader(b"\x01")
    source.bits(3)
    with pytest.raises(FormatError, match="not zero"):
        source.byte_end()


@given(st.sets(st.integers(0, 255), min_size=2))
def test_alphabets(present: set[int]) -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[sorted(present)] = 1
    found = alphabets(counts)
    assert any(set(a.symbols.tolist()) == present for a in found)
    for alphabet in found:
        assert present <= set(alphabet.symbols.tolist())
        out = BitWriter()
        write_alphabet(out, alphabet)
        again = read_alphabet(BitReader(out.to_bytes()))
        assert again.symbols.tolist() == alphabet.symbols.tolist()
        start, offsets = reference.alphabet(reference.Bits(out.to_bytes(), 0))
        assert [(start + offset) % 256 for offset in offsets] == alphabet.symbols.tolist()


def test_signed_bytes_are_one_run() -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[[250, 251, 252, 253, 254, 255, 0, 1, 2]] = 1
    run = [a for a in alphabets(counts) if a.start == 250]
    assert run[0].offsets.tolist() == list(range(9))
