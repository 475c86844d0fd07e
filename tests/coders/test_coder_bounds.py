"""Sizes against lower bounds of order-0 coders: N * H, and log2 C(N, k) for masks."""

from math import comb, log2

import numpy as np
import pytest
from coder_cases import KINDS, make, static_reference
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import encode, order0_bits
from tersor.coders.rans.table_plan import UNIT, best_table
from tersor.coders.rans.tables import MAX_BITS, MIN_BITS, OCTAVES, frequencies


@pytest.mark.parametrize("kind", KINDS)
def test_long_streams_are_within_one_percent(kind: str) -> None:
    symbols = make(kind, 300_000)
    bound = order0_bits(symbols) / 8
    nbytes = len(encode(symbols))
    assert bound <= nbytes <= 1.01 * bound + 6  # 6: the first byte, a pair's table, the state


@pytest.mark.parametrize("share", [1e-5, 1e-4, 0.003, 0.02, 0.3])
def test_rare_symbols_are_near_the_bound(share: float) -> None:
    symbols = (np.random.default_rng(1).random(1_000_000) < share).astype(np.uint8) * 9
    bound = order0_bits(symbols) / 8
    # The smallest frequency is 2^-16: for rarer symbols the precision costs a little.
    assert len(encode(symbols)) <= (1.01 if share > 2e-5 else 1.1) * bound + 7


@pytest.mark.parametrize(
    ("size", "ones"), [(200, 10), (2000, 100), (30000, 1500), (30000, 27000), (65537, 3)]
)
def test_masks_are_near_log2_of_the_number_of_masks(size: int, ones: int) -> None:
    symbols = np.zeros(size, dtype=np.uint8)
    symbols[np.random.default_rng(2).choice(size, ones, replace=False)] = 1
    assert len(encode(symbols)) <= 1.01 * log2(comb(size, ones)) / 8 + 7


@pytest.mark.parametrize("symbols", [(0, 1), (17, 18), (255, 0), (3, 200)])
def test_a_table_of_two_symbols_takes_four_bytes(symbols: tuple[int, int]) -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[list(symbols)] = 28500, 1500
    head = best_table(counts).head
    assert len(head.to_bytes()) <= (3 if 0 < symbols[0] == symbols[1] - 1 or symbols[0] == 0 else 4)


@pytest.mark.parametrize(
    ("kind", "length", "most"),
    # Bytes above N * H: the first byte, the table, the state, and the loss of a short table.
    [
        ("ternary", 200, 8),
        ("normal 2", 200, 13),
        ("normal 30", 2000, 45),
        ("pruned", 2000, 45),
        ("Laplace", 2000, 45),
    ],
)
def test_short_streams_have_short_tables(kind: str, length: int, most: int) -> None:
    for seed in range(3):
        symbols = make(kind, length, seed)
        assert len(encode(symbols)) <= order0_bits(symbols) / 8 + most


@given(
    st.integers(MIN_BITS, MAX_BITS),
    st.integers(0, 7),
    st.lists(st.floats(0, 1), min_size=2, max_size=256),
)
def test_frequencies(bits: int, detail: int, parts: list[float]) -> None:
    depths = np.array([round(part * (OCTAVES << detail)) for part in parts])
    found = frequencies(depths, detail, bits)
    assert found.min() >= 1
    assert found.sum() == 1 << bits
    assert found.tolist() == static_reference.from_depths(depths.tolist(), detail, bits)


@given(st.lists(st.integers(1, 10**7), min_size=3, max_size=256))
def test_tables_contain_every_symbol_and_cost_as_planned(numbers: list[int]) -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[: len(numbers)] = numbers
    choice = best_table(counts)
    table = choice.table
    f = dict(zip(table.symbols.tolist(), table.frequencies.tolist(), strict=True))
    assert sum(f.values()) == 1 << table.bits
    payload = sum(n * (table.bits - log2(f[symbol])) for symbol, n in enumerate(numbers))
    assert payload * 0.9999 - 1 <= choice.cost / UNIT <= payload * 1.002 + 1
    n = np.array(numbers)
    assert payload >= float((n * np.log2(n.sum() / n)).sum()) * 0.999999
