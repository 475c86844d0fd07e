"""Binary and ternary weights against brute force over all codes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths.signs import BINARY, RULES, TERNARY, binary, ternary
from tersor.maths.units import PER, TINY

rows = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=7)


def best_error(values: list[float], book: tuple[float, ...]) -> float:
    """Least squares over every assignment of codes."""
    w = torch.tensor(values, dtype=torch.float64)
    best = float(w.square().sum())
    for codes in itertools.product(book, repeat=len(values)):
        b = torch.tensor(codes, dtype=torch.float64)
        if b.any():
            scale = float((w @ b) / (b @ b))
            best = min(best, float((w - scale * b).square().sum()))
    return best


def error(w, index, scale, book) -> float:
    decoded = torch.tensor(book, dtype=torch.float64)[index.long()] * scale.double()
    return float((w.double() - decoded).square().sum())


@settings(max_examples=60, deadline=None)
@given(rows)
def test_binary_is_the_best_of_all_codes(values):
    w = torch.tensor([values])
    index, scale = binary(w)
    assert error(w, index, scale, BINARY) <= best_error(values, BINARY) + 1e-5


@settings(max_examples=60, deadline=None)
@given(rows)
def test_exact_ternary_is_the_best_of_all_codes(values):
    w = torch.tensor([values])
    index, scale = ternary(w, rule="exact")
    assert error(w, index, scale, TERNARY) <= best_error(values, TERNARY) + 1e-5


def test_twn_by_hand():
    w = torch.tensor([[0.04, -1.0, 0.62, -0.34], [0.04, -1.0, 0.6, -0.36]])  # mean 0.5, threshold 0.35
    index, scale = ternary(w)
    assert index.tolist() == [[1, 0, 2, 1], [1, 0, 2, 0]]
    assert torch.allclose(scale, torch.tensor([[0.81], [1.96 / 3]]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7), (5, 13)])
@pytest.mark.parametrize("size", [0.0, 1e-41, 1e-25, 1.0, 1e38])
def test_shapes_and_extremes(rule, per, shape, size):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * size
    want = {"tensor": (1, 1), "channel": (shape[0], 1), "group": (shape[0], -(-shape[1] // 4))}[per]
    for index, scale, top in (
        (*binary(w, per, group=4), 1),
        (*ternary(w, per, None, rule, group=4), 2),
    ):
        assert tuple(scale.shape) == want
        assert index.dtype == torch.uint8
        assert index.max() <= top
        assert (scale >= TINY).all()
        assert torch.isfinite(scale).all()
    if size == 0:
        assert (index == 1).all()


def test_constant_rows_are_exact():
    w = torch.tensor([[-0.3] * 5, [0.7] * 5])
    for index, scale, book in ((*binary(w), BINARY), *((*ternary(w, rule=r), TERNARY) for r in RULES)):
        assert torch.allclose(torch.tensor(book)[index.long()] * scale, w)


@pytest.mark.parametrize("per", PER)
def test_only_kept_weights_count(per):
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    loud = torch.where(keep, w, 1e6)
    for make in (binary, ternary, lambda v, p, k: ternary(v, p, k, "exact")):
        (index, scale), (other, same) = make(w, per, keep), make(loud, per, keep)
        assert torch.equal(scale, same)
        assert torch.equal(index[keep], other[keep])


def test_refusals():
    with pytest.raises(SettingError, match="did you mean 'exact'"):
        ternary(torch.ones(1, 2), rule="exakt")
    with pytest.raises(SettingError, match="NaN"):
        binary(torch.tensor([[torch.nan]]))
