"""Frequency tables that an encoder chooses, against the same choice with arrays and against all neighbors."""

import itertools

import numpy as np
import pytest
from coder_cases import make
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.coders import encode
from tersor.coders.alphabet import alphabet_bits, alphabets, write_alphabet
from tersor.coders.bit_strings import MAX_ONES, BitWriter, list_bits, steps_of, write_numbers
from tersor.coders.mixing.lags_loops import lag_scores
from tersor.coders.rans import table_plan_loops, tables
from tersor.coders.rans.table_plan import cost_of, log2_table
from tersor.coders.static import is_noise

counts_lists = st.lists(st.integers(0, 10**6), min_size=3, max_size=256).filter(
    lambda n: sum(map(bool, n)) > 2
)


def nearest_depths(n: np.ndarray, detail: int, bits: int) -> np.ndarray:
    """Steps of 2^-detail octaves below the largest weight, by logarithms."""
    share = np.maximum(n / n.sum() * (1 << bits) - 1, 0.5) / ((1 << bits) - len(n))
    octave = np.clip(tables.OCTAVES + np.log2(share / share.max()), 0, tables.OCTAVES)
    whole = np.floor(octave)
    part = np.exp2(octave - whole) - 1
    return (tables.OCTAVES - whole) * 2**detail - part * 2**detail


@given(counts_lists, st.integers(tables.MIN_BITS, tables.MAX_BITS))
def test_depths_are_the_nearest_and_costs_are_those_of_their_frequencies(
    numbers: list[int], bits: int
) -> None:
    n = np.array(numbers)
    depths, costs = np.empty((8, len(n)), np.int64), np.empty(8, np.int64)
    table_plan_loops.lists_of(n, bits, log2_table(), depths, costs)
    for detail in range(8):
        assert abs(depths[detail] - nearest_depths(n, detail, bits)).max() <= 0.5 + 1e-6
        f = tables.frequencies(depths[detail], detail, bits)
        assert costs[detail] == cost_of(n, f, bits)
    all_bits = table_plan_loops.costs_by_bits(n, bits, bits, 7, log2_table())
    assert all_bits.tolist() == [costs[7]]


def cost_of_shape(n, offsets, bits, peak, parameters):
    center, slope, bend, height = parameters
    depths = tables.shape_depths(offsets, center, slope, bend)
    if peak >= 0:
        depths = depths + tables.PEAK_SCALE * height * (np.arange(len(n)) != peak)
    depths = np.minimum(depths, tables.OCTAVES << tables.SHAPE_DETAIL)
    return int(cost_of(n, tables.frequencies(depths, tables.SHAPE_DETAIL, bits), bits))


def searched(n, offsets, bits, peak, points, most):  # noqa: PLR0917  the loop takes them in this order
    """The search with every neighbor computed anew, in the order in which ties are decided."""

    def cheapest(candidates):
        return min(candidates, key=lambda found: cost_of_shape(n, offsets, bits, peak, found))

    here = cheapest(points.tolist())
    cross = list(itertools.product(*[(0, -1, 1)] * 3, (0, -1, 1) if peak >= 0 else (0,)))
    for stride in table_plan_loops.STRIDES:
        for _ in range(table_plan_loops.MOVES):
            near = [np.clip(np.array(here) + stride * np.array(step), 0, most).tolist() for step in cross]
            found = cheapest(near)
            if found == here:
                break
            here = found
    return here


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.booleans(), st.integers(9, 16))
def test_the_search_finds_what_all_neighbors_give(seed: int, size: int, with_peak: bool, bits: int) -> None:
    draw = np.random.default_rng(seed)
    n = np.bincount(np.clip(draw.laplace(size / 2, size / 9, 500).astype(int), 0, size - 1), minlength=size)
    offsets, most = np.arange(size), np.array([511, 127, 127, 255])
    points = np.array([[size, 0, 40, 16], [size, 30, 0, 16], [0, 127, 0, 0]])
    peak = int(n.argmax()) if with_peak else -1
    found = table_plan_loops.search(n, offsets, bits, peak, points, most, log2_table())
    expected = searched(n, offsets, bits, peak, points, most)
    costs = [cost_of_shape(n, offsets, bits, peak, each) for each in (found.tolist(), expected)]
    assert found.tolist() == expected, costs


@given(st.lists(st.lists(st.integers(0, 2560), min_size=7, max_size=7), min_size=1, max_size=4))
def test_bits_of_lists(rows: list[list[int]]) -> None:
    """By the definition of both codes, number by number."""
    found = list_bits(np.array(rows))
    for row, bits in zip(rows, found, strict=True):
        for kind, numbers in enumerate((row, steps_of(np.array(row)).tolist())):
            for order in range(8):
                high = [n >> order for n in numbers]
                if max(high) <= MAX_ONES:
                    assert bits[kind, 0, order] == 5 + sum(h + 1 + order for h in high)
                else:
                    assert bits[kind, 0, order] > 1 << 30
                assert bits[kind, 1, order] == 5 + sum(2 * (h + 1).bit_length() - 1 + order for h in high)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=50), st.integers(0, 7), st.booleans())
def test_numbers_are_written_as_one_by_one(numbers: list[int], order: int, golomb: bool) -> None:
    slow, fast = BitWriter(), BitWriter()
    for number in numbers:
        (slow.golomb if golomb else slow.rice)(number, order)
    write_numbers(fast, np.array(numbers), int(golomb), order, slow.length)
    assert (fast.value, fast.length) == (slow.value, slow.length)


@given(st.sets(st.integers(0, 255), min_size=2))
def test_bits_of_an_alphabet(present: set[int]) -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[sorted(present)] = 1
    for alphabet in alphabets(counts):
        out = BitWriter()
        write_alphabet(out, alphabet)
        assert alphabet_bits(alphabet) == out.length


@pytest.mark.parametrize("shape", [(1, 30), (20, 9), (7, 80)])
def test_lags_score_covariance_and_agreement(shape: tuple[int, int]) -> None:
    signs = np.random.default_rng(3).integers(-1, 2, shape).astype(np.int8)
    scores = np.zeros(min(64, shape[1] - 1) + 1)
    lag_scores(signs, scores)
    assert (scores[:2] == 0).all()
    for lag in range(2, len(scores)):
        ahead, behind = signs[:, lag:].astype(float), signs[:, :-lag].astype(float)
        expected = ((ahead != 0) * (behind != 0)).mean() - (signs != 0).mean() ** 2
        assert scores[lag] == pytest.approx(expected + abs((ahead * behind).mean()), abs=1e-6)


@pytest.mark.parametrize("count", [100, 300, 1000, 4000])
def test_few_bytes_of_floats_are_noise_only_if_no_table_pays(count: int) -> None:
    symbols = np.random.default_rng(count).integers(0, 256, count).astype(np.uint8)
    noise = np.bincount(symbols, minlength=256)
    assert is_noise(noise, floats=True)
    assert not is_noise(noise)
    assert min(len(encode(symbols, coder)) for coder in ("huffman", "rans")) >= count  # even with shapes
    assert not is_noise(np.bincount(make("normal 30", count), minlength=256), floats=True)
