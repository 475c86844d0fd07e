"""Leaf costs compared with counts by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.encode import coded
from tersor.forms import Affine, Codebook, Dense, LowRank, Masked
from tersor.measure.bits import bits_of
from tersor.measure.leaf_costs import BINS, leaf_costs_of
from tersor.measure.order0 import FEW


def entropy(symbols: list[int]) -> float:
    """N * H, by counting."""
    counts = Counter(symbols)
    return sum(-n * math.log2(n / len(symbols)) for n in counts.values())


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=80))
def test_a_leaf_of_codes_has_their_entropy_and_their_histogram(codes: list[int]) -> None:
    array = torch.tensor(codes, dtype=torch.int8)
    for form in (Dense(array), coded(array)):
        (leaf,) = leaf_costs_of(form)
        assert (leaf.path, leaf.count, leaf.nbytes) == ("", len(codes), form.nbytes)
        assert leaf.order0 == pytest.approx(entropy(codes))
        steps = range(min(codes), max(codes) + 1)
        assert (leaf.low, leaf.high) == (min(codes), max(codes))
        assert list(leaf.counts) == [codes.count(code) for code in steps]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_masked_elements_are_not_counted(keep: list[bool]) -> None:
    index = torch.arange(len(keep)).remainder(4).to(torch.uint8)[None]
    mask = torch.tensor([keep])
    for form in (
        Masked(Dense(mask), Codebook(Dense(index), Dense(torch.arange(4.0)))),
        Masked(coded(mask), Codebook(coded(index, mask), Dense(torch.arange(4.0)))),
    ):
        leaves = {leaf.path: leaf for leaf in leaf_costs_of(form)}
        assert list(leaves) == ["keep", "body.index", "body.book"]
        kept = [n % 4 for n, here in enumerate(keep) if here]
        assert leaves["body.index"].count == len(kept) == sum(leaves["body.index"].counts)
        assert leaves["body.index"].order0 == pytest.approx(entropy(kept) if kept else 0)
        assert leaves["keep"].order0 == pytest.approx(entropy([int(here) for here in keep]))
        assert sum(leaf.nbytes for leaf in leaves.values()) == form.nbytes


def test_floats_are_counted_by_their_bytes() -> None:
    values = torch.randn(FEW, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    raw = values.view(torch.uint8).reshape(-1, 2)
    (leaf,) = leaf_costs_of(Dense(values))
    assert leaf.order0 == pytest.approx(sum(entropy(plane.tolist()) for plane in raw.T))
    assert len(leaf.counts) == BINS
    assert sum(leaf.counts) == FEW
    (few,) = leaf_costs_of(Dense(values[1:]))
    assert few.order0 == 16 * (FEW - 1)


def test_every_leaf_is_there_once_and_bytes_add_up() -> None:
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    codes = (w * 3).round().to(torch.int8)
    grid = Affine(coded(codes), Dense(torch.ones(8, 1)), bits=4)
    for form in (grid, LowRank(Dense(w), Dense(w.T)), Dense(torch.zeros(0)), Dense(torch.tensor(3.0))):
        leaves = list(leaf_costs_of(form))
        assert sum(leaf.nbytes for leaf in leaves) == form.nbytes == bits_of(form).stored // 8
        assert len({leaf.path for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    "array",
    [
        torch.tensor([math.nan, math.inf, 1.0]),
        torch.tensor([1 + 2j]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([-1e308, 1e308], dtype=torch.float64),
        torch.tensor([-(2**62), 2**62]),
        torch.tensor([True]),
        torch.full((9,), 7, dtype=torch.int32),
    ],
)
def test_unusual_values_have_a_histogram_or_none(array: torch.Tensor) -> None:
    (leaf,) = leaf_costs_of(Dense(array))
    assert sum(leaf.counts) <= array.numel()
    assert leaf.order0 >= 0
