"""Refine: the structure around the weights is kept, and a lost grid is reported."""

from collections.abc import Iterator

import torch
from hypothesis import given
from random_forms import forms
from torch import Tensor

from tersor.encode import refine
from tersor.forms import Affine, Coded, Dense, Form, LowRank, Masked, Sum, uncoded

OUTER = (Masked, LowRank, Sum)


def weights_of(form: Form, keep: Tensor | None = None) -> Iterator[tuple[Form, Tensor | None]]:
    """The nodes that hold numbers, found through masks, products and sums only, with the mask above each."""
    if isinstance(form, Masked):
        mine = form.keep.decode()
        yield from weights_of(form.body, mine if keep is None else mine & keep)
    elif isinstance(form, LowRank):
        yield from weights_of(form.left)
        yield from weights_of(form.right)
    elif isinstance(form, Sum):
        yield from weights_of(form.a, keep)
        yield from weights_of(form.b, keep)
    else:
        yield form, keep


def skeleton(form: Form) -> object:
    """The outer nodes as nested tuples; masks count with their content."""
    if isinstance(form, Masked):
        return ("masked", form.keep.decode().tolist(), skeleton(form.body))
    if isinstance(form, OUTER):
        return (form.name, *(skeleton(child) for child in form.children().values()))
    return "weights"


def test_structures_are_those_with_inner_forms() -> None:
    from tersor.forms import FORMS

    assert {kind for kind in FORMS.values() if kind.inner} == set(OUTER)


@given(forms())
def test_outer_nodes_are_kept_and_lost_grids_are_reported(form: Form) -> None:
    plain = list(weights_of(uncoded(form)))
    after, how = refine(form, lambda w, keep, axis: Dense(w + 1))
    assert skeleton(after) == skeleton(uncoded(form))
    assert how == ("refine" if all(isinstance(node, Dense) for node, _ in plain) else "absorb")
    for (old, keep), (new, _) in zip(plain, weights_of(after), strict=True):
        assert torch.equal(new.decode(), old.decode(keep) + 1)


@given(forms())
def test_store_is_given_weights_and_the_mask_above_them(form: Form) -> None:
    plain = list(weights_of(uncoded(form)))
    given: list[tuple[Tensor, Tensor | None]] = []

    def store(w: Tensor, keep: Tensor | None, axis: int) -> Form:
        given.append((w, keep))
        return Dense(w)

    refine(form, store, 1)
    assert len(given) == len(plain)
    for (w, mask), (node, keep) in zip(given, plain, strict=True):
        assert torch.equal(w, node.decode(keep))
        assert (mask is None) == (keep is None)
        assert mask is None or torch.equal(mask, keep)


def test_nested_masks_narrow() -> None:
    outer, inner = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    seen = []

    def store(w: Tensor, keep: Tensor | None, axis: int) -> Form:
        seen.append(keep)
        return Dense(w)

    refine(Masked(Dense(outer), Sum(Masked(Dense(inner), Dense(torch.ones(3))), Dense(torch.ones(3)))), store)
    assert [keep.tolist() for keep in seen] == [[False, True, False], [True, True, False]]


def test_a_stored_copy_decodes_to_the_same() -> None:
    w, keep = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    form = Masked(Dense(keep), Dense(w))
    after, _ = refine(form, lambda w, keep, axis: Dense(w))
    assert torch.equal(after.decode(), form.decode())


def test_the_axis_of_rows_is_the_sites_except_in_factors() -> None:
    w, axes = torch.zeros(2, 3), []

    def store(w: Tensor, keep: Tensor | None, axis: int) -> Form:
        axes.append(axis)
        return Dense(w)

    refine(Sum(Dense(w), Masked(Dense(w.bool()), Dense(w))), store, 1)
    refine(LowRank(Dense(w), Dense(w.T)), store, 1)
    assert axes == [1, 1, 0, 0]


def test_a_coded_grid_is_a_grid() -> None:
    codes = Coded(torch.tensor([0, 1, 2], dtype=torch.uint8), (1, 2), "int8", (3,))
    assert refine(Affine(codes, Dense(torch.ones(1, 1))), lambda w, keep, axis: Dense(w))[1] == "absorb"
