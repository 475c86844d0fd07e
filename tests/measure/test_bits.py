"""The bits that a form stores, and the order-0 bound, compared with counts by hand."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.encode import coded
from tersor.forms import Affine, At, Codebook, Dense, Form, LowRank, Masked
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.measure.bits import bits_of
from tersor.report.html import page
from tersor.report.show import shown
from tersor.report.table import bit_rows
from tersor.steps import Entropy, Measure, Prune, Quantize


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
    choice = entropy([int(here) for here in keep])
    assert bits_of(form).bound == pytest.approx(choice + entropy(kept) + 4 * 32)


def test_few_floats_count_as_they_are_and_many_by_their_bytes() -> None:
    w, keep = torch.randn(8, 8), torch.rand(8, 8) < 0.4
    assert bits_of(Dense(w)).bound == 32 * 64
    hidden = entropy(keep.flatten().tolist())
    assert bits_of(Masked(Dense(keep), Dense(w))).bound == pytest.approx(hidden + 32 * int(keep.sum()))
    many = torch.randn(64, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    planes = many.view(torch.uint8).reshape(-1, 2).T.tolist()
    assert bits_of(Dense(many)).bound == pytest.approx(sum(map(entropy, planes)))
    assert bits_of(coded(torch.ones(64, 64))).bound == 0


def test_the_tables_of_run_and_show_and_the_note_of_measure_agree(tmp_path: Path) -> None:
    """Two numbers were both called order 0: 5.565 and 6.152 bits for one file."""
    rng = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 80), nn.Linear(2, 5000))
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
    steps = (Prune(keep=0.6), Quantize(bits=12, where="0.weight"), Entropy(), Measure())
    save(run(net, Recipe(steps)), tmp_path / "m")
    result = load(tmp_path / "m")
    facts = shown(result, tmp_path / "m")
    slow = 0.0
    for form in result.forms.values():
        for at in At(form).down():
            if not at.node.children():
                array = at.node.decode(at.keep)
                array = (array if at.keep is None else array[at.keep]).contiguous()
                planes = array.view(torch.uint8).reshape(-1, array.dtype.itemsize).T.tolist()
                raw = array.is_floating_point() and array.numel() < 4096
                slow += 8 * array.nbytes if raw else sum(map(entropy, planes))
    assert facts["sum"]["order0"] == pytest.approx(slow)
    assert facts["bits"]["bound"] == pytest.approx(slow)
    assert sum(note.data["bound"] for note in result.ledger.notes("bits")) + sum(
        site["bound"] for name, site in facts["sites"].items() if name.endswith("bias")
    ) == pytest.approx(slow)
    per = f"{slow / sum(value.numel() for value in net.parameters()):.3f}"
    assert per in page(facts)
    assert [row[3] for row in bit_rows(facts)] == [f"entropy bound {per} (order 0)"]


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
