"""Code lengths: optimal like those of an independent Huffman code, and optimal among limited codes."""

import heapq
import itertools

import numpy as np
import pytest
from coder_cases import KINDS, make
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import decode, encode
from tersor.coders.bytes.huffman import canonical, code_lengths, package_merge


def huffman_cost(counts: list[int]) -> int:
    """The sum of the weights of all inner nodes, which is the length of the coded message."""
    heap = list(counts)
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        joint = heapq.heappop(heap) + heapq.heappop(heap)
        total += joint
        heapq.heappush(heap, joint)
    return total


def cheapest(counts: list[int], limit: int) -> int:
    """The least cost, by trying all lengths up to the limit that fit into the code space."""
    fits = (
        lengths
        for lengths in itertools.combinations_with_replacement(range(1, limit + 1), len(counts))
        if sum(2**-n for n in lengths) <= 1
    )
    return min(int(np.dot(lengths, sorted(counts, reverse=True))) for lengths in fits)


counts_lists = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 10**9)), min_size=2, max_size=256)


@given(counts_lists)
def test_lengths_are_optimal(numbers: list[int]) -> None:
    counts = np.array(numbers)
    lengths = code_lengths(counts, 255)
    assert int(counts @ lengths) == huffman_cost(numbers)


@given(counts_lists)
def test_limited_lengths_fill_the_code_space(numbers: list[int]) -> None:
    counts = np.array(numbers)
    lengths = code_lengths(counts)
    assert lengths.min() >= 1
    assert lengths.max() <= 15
    assert sum(2 ** (15 - int(n)) for n in lengths) == 2**15
    assert int(counts @ lengths) >= huffman_cost(numbers)
    assert int(counts @ package_merge(counts, 60)) == huffman_cost(numbers)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=7), st.integers(3, 5))
def test_limited_lengths_are_optimal(numbers: list[int], limit: int) -> None:
    assert int(np.dot(numbers, package_merge(np.array(numbers), limit))) == cheapest(numbers, limit)


@given(counts_lists)
def test_no_code_is_a_prefix_of_another(numbers: list[int]) -> None:
    lengths = code_lengths(np.array(numbers))
    codes = sorted(
        f"{code:0{n}b}" for code, n in zip(canonical(lengths).tolist(), lengths.tolist(), strict=True)
    )
    assert not any(b.startswith(a) for a, b in itertools.pairwise(codes))


def test_lengths_above_twelve_bits_round_trip() -> None:
    """Fibonacci numbers give the deepest tree. The longest codes do not fit into the decoder's lookup."""
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    symbols = np.repeat(np.arange(20, dtype=np.uint8) * 13, counts)
    np.random.default_rng(0).shuffle(symbols)
    lengths = code_lengths(np.array(counts))
    assert lengths.max() == 15
    assert int(np.dot(counts, lengths)) > huffman_cost(counts)
    assert (decode(encode(symbols, "huffman"), len(symbols)) == symbols).all()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"one symbol"}))
def test_streams_have_little_overhead(kind: str) -> None:
    symbols = make(kind, 20000)
    counts = np.unique(symbols, return_counts=True)[1]
    payload = huffman_cost(counts.tolist()) / 8
    assert (
        payload
        <= len(encode(symbols, "huffman"))
        <= payload + 5 + (2.5 if kind == "sparse" else 0.6) * len(counts)
    )
