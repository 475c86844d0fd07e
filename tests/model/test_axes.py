"""Axes: reshaped and transposed forms decode to the same numbers and keep their classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_forms import Draw

from tersor.encode import coded
from tersor.errors import RefusedError
from tersor.forms import Affine, Codebook, Coded, Dense, Form, LogGrid, LowRank, Masked, Sum
from tersor.model.axes import transposed, with_ones

SHAPES = ((1, 1), (7, 1), (1, 7), (4, 10), (5, 3), (0, 3), (3, 0))


def kinds(form: Form) -> list[str]:
    """The nodes of a tree, with streams as leaves."""
    return sorted(node.name.replace("coded", "dense") for _, node in form.walk())


def drawn(draw: st.DataObject) -> Form:
    d = Draw(draw.draw, torch.Generator().manual_seed(draw.draw(st.integers(0, 99))))
    return d.weights(d.pick(*SHAPES), 0)


@given(st.data(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_axes_of_length_one_are_appended(data: st.DataObject, count: int) -> None:
    form = drawn(data)
    new = with_ones(form, count)
    shape = (*form.shape, *[1] * count)
    assert new.shape == shape
    assert torch.equal(new.decode(), form.decode().reshape(shape))
    assert [node.name for _, node in new.walk()] == [node.name for _, node in form.walk()]
    assert new.nbytes == form.nbytes


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_matrix_is_transposed(data: st.DataObject) -> None:
    form = drawn(data)
    new = transposed(form)
    assert new.shape == form.shape[::-1]
    if any(node.name == "lowrank" for _, node in form.walk()):  # a product may sum in another order
        assert torch.allclose(new.decode(), form.decode().T, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(new.decode(), form.decode().T)
    assert kinds(new) == kinds(form)
    twice = transposed(new)
    assert torch.equal(twice.decode(), form.decode())


GRIDS = {
    "affine": Affine(Dense(torch.tensor([[1, 2, 3], [4, 5, 6]]).to(torch.int8)), Dense(torch.rand(2, 1))),
    "affine, other axis": Affine(
        Dense(torch.tensor([[1, 2, 3], [4, 5, 6]]).to(torch.int8)), Dense(torch.rand(3, 1)), axis=1
    ),
    "affine, groups": Affine(
        Dense(torch.ones(2, 5, dtype=torch.int8)),
        Dense(torch.rand(2, 3)),
        Dense(torch.ones(2, 3, dtype=torch.int16)),
        group=2,
    ),
    "codebook": Codebook(
        Dense(torch.tensor([[1, 0, 1], [0, 0, 1]]).to(torch.uint8)), Dense(torch.rand(2, 2))
    ),
    "loggrid": LogGrid(Dense(torch.tensor([[1, 0, 1], [0, 0, -1]]).to(torch.int8)), Dense(torch.rand(1, 1))),
}


@pytest.mark.parametrize("what", GRIDS)
def test_grids_stay_grids(what: str) -> None:
    form = GRIDS[what]
    assert type(transposed(form)) is type(with_ones(form, 2)) is type(form)
    assert transposed(form).axis == 1 - form.axis
    assert with_ones(form, 2).axis == form.axis
    assert torch.equal(transposed(form).decode(), form.decode().T)
    assert torch.equal(with_ones(form, 2).decode()[..., 0, 0], form.decode())


def test_streams_stay_streams() -> None:
    """The 1x1 convolution weight has the same stream as the matrix, which leaves out masked elements."""
    keep = torch.rand(6, 9) < 0.5
    form = Masked(coded(keep, coder="fast"), coded(torch.randn(6, 9), keep, "fast"))
    new = with_ones(form, 2)
    assert isinstance(new, Masked)
    assert isinstance(new.body, Coded)
    assert new.body.data is form.body.data
    assert torch.equal(new.decode(), form.decode()[..., None, None])
    over = transposed(form)
    assert isinstance(over.body, Dense)
    assert torch.equal(over.decode(), form.decode().T)


def test_the_parts_of_products_and_sums_are_transposed() -> None:
    a, b, c = torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 3)
    form = Sum(LowRank(Dense(a), Dense(b)), Dense(c))
    over, pixel = transposed(form), with_ones(form, 1)
    assert isinstance(over, Sum)
    assert isinstance(over.a, LowRank)
    assert torch.equal(over.a.left.decode(), b.T)
    assert torch.equal(over.a.right.decode(), a.T)
    assert pixel.a.right.shape == (2, 3, 1)
    assert torch.allclose(pixel.decode()[..., 0], a @ b + c)


def test_only_matrices_can_be_transposed() -> None:
    with pytest.raises(RefusedError, match=r"a form of shape \[2, 3, 1\] is not a matrix"):
        transposed(Dense(torch.ones(2, 3, 1)))
