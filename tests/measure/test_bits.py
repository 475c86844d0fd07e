"""The bits that a form stores, and the order-0 bound, compared with counts by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.encode import coded
from tersor.forms import Affine, Codebook, Dense, Form, LowRank, Masked
from tersor.measure.bits import bits_of


def entropy(symbols: list[int]) -> float:
    """N * H, by counting."""
    counts = Counter(symbols)
    return sum(-n * math.log2(n / len(symbols)) for n in counts.values())


def book(index: Tensor) -> Codebook:
    return Codebook(Dense(index), Dense(torch.arange(4.0)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_indices_cost_their_entropy_and_the_table_its_floats(symbols: list[int]) -> None:
    found = bits_of(book(torch.tensor([symbols], dtype=torch.uint8)))
    assert found.weights == len(symbols)
    assert found.stored == 8 * len(symbols) + 4 * 32
    assert found.bound == pytest.approx(entropy(symbols) + 4 * 32)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_mask_costs_its_choice_and_hides_for_free(keep: list[bool]) -> None:
    index = torch.arange(len(keep)).remainder(4).to(torch.uint8)[None]
    form = Masked(Dense(torch.tensor([keep])), book(index))
    kept = [n % 4 for n, here in enumerate(keep) if here]
    choice = math.log2(math.comb(len(keep), len(kept)))
    assert bits_of(form).bound == pytest.approx(choice + entropy(kept) + 4 * 32)


def test_floats_count_as_they_are_stored() -> None:
    w, keep = torch.randn(8, 8), torch.rand(8, 8) < 0.4
    assert bits_of(Dense(w)).bound == 32 * 64
    hidden = math.log2(math.comb(64, int(keep.sum())))
    assert bits_of(Masked(Dense(keep), Dense(w))).bound == pytest.approx(hidden + 32 * int(keep.sum()))
    stream = coded(torch.ones(64, 64))
    assert bits_of(stream).bound == bits_of(stream).stored < 32 * 64


def big(form: str) -> Form:
    """A form large enough for its coder, coded."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    keep = w.abs() > 1
    codes = (w * 3).round().clamp(-8, 7).to(torch.int8)
    if form == "dense":
        return coded(w)
    grid = Affine(coded(codes), Dense(torch.ones(1, 1)))
    if form == "affine":
        return grid
    if form == "lowrank":
        return LowRank(grid, Affine(coded(codes), Dense(torch.ones(1, 1))))
    return Masked(coded(keep), Affine(coded(codes, keep), Dense(torch.ones(1, 1))))


@pytest.mark.parametrize("form", ["dense", "affine", "lowrank", "masked"])
def test_coding_comes_near_the_bound_and_never_below(form: str) -> None:
    """Except for stream headers: at most 64 bytes each here."""
    found = bits_of(big(form))
    assert found.bound <= found.stored <= 1.02 * found.bound + 8 * 64 * 2
    assert found.per_weight == found.stored / (64 * 64)
    assert found.bound_per_weight == found.bound / (64 * 64)


def test_coding_does_not_move_the_bound_of_symbols() -> None:
    codes = torch.randint(0, 4, (64, 64), dtype=torch.uint8)
    plain, stream = book(codes), Codebook(coded(codes), Dense(torch.arange(4.0)))
    assert bits_of(plain).bound == pytest.approx(bits_of(stream).bound)


def test_nothing_costs_nothing() -> None:
    found = bits_of(Dense(torch.zeros(0, 3)))
    assert (found.weights, found.stored, found.bound, found.per_weight) == (0, 0, 0.0, 0.0)
