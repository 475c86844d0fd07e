"""At: mask and axis are passed down as docs/format.md specifies; a tree is rebuilt only where it changes."""

from collections.abc import Iterator
from unittest import mock

import torch
from hypothesis import given
from random_forms import forms
from torch import Tensor

from tersor.forms import Affine, At, Codebook, Coded, Dense, Form, LowRank, Masked, Sum, uncoded


def expected(
    form: Form, path: str, keep: Tensor | None, axis: int
) -> Iterator[tuple[str, Tensor | None, int]]:
    """Path, mask and axis of each node, form by form, by sections 5 and 6 of docs/format.md."""
    yield path, keep, axis

    def below(
        key: str, mask: Tensor | None = None, line: int = axis
    ) -> Iterator[tuple[str, Tensor | None, int]]:
        yield from expected(form.children()[key], f"{path}.{key}" if path else key, mask, line)

    match form:
        case Masked():
            mine = form.keep.decode()
            yield from below("keep")
            yield from below("body", mine if keep is None else mine & keep)
        case Sum():
            yield from below("a", keep)
            yield from below("b", keep)
        case LowRank():
            yield from below("left", None, 0)
            yield from below("right", None, 0)
        case _:
            for key in form.children():
                yield from below(key, keep if key in ("codes", "index") else None)


@given(forms())
def test_masks_and_axes_are_passed_down(form: Form) -> None:
    found = list(At(form, axis=1).down())
    wanted = list(expected(form, "", None, 1))
    assert [at.path for at in found] == [path for path, _, _ in wanted] == [path for path, _ in form.walk()]
    for at, (path, keep, axis) in zip(found, wanted, strict=True):
        assert at.node is dict(form.walk())[path]
        assert at.axis == axis
        assert (at.keep is None) == (keep is None)
        assert keep is None or torch.equal(at.keep, keep)


@given(forms())
def test_a_mask_above_the_root_reaches_aligned_nodes(form: Form) -> None:
    above = torch.rand(form.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for at in At(form, given=above).down():
        (wanted,) = (keep for path, keep, _ in expected(form, "", above, 0) if path == at.path)
        assert (at.keep is None) == (wanted is None)
        assert wanted is None or torch.equal(at.keep, wanted)


@given(forms())
def test_masks_lists_the_paths_of_all_masks_above(form: Form) -> None:
    nodes = dict(form.walk())
    for at in At(form).down():
        keeps = [nodes[path].decode() for path in at.masks]
        assert (at.keep is None) == (not keeps)
        assert at.keep is None or torch.equal(at.keep, torch.stack(keeps).all(0))


def test_inner_children_are_weights() -> None:
    w, keep = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    grid = Affine(Dense(w.char()), LowRank(Dense(w[:, :1]), Dense(w[:1])), group=1)
    form = Sum(Masked(Dense(keep), grid), LowRank(Dense(w), Codebook(Dense(w.byte()), Dense(w[0]))))
    found = {at.path for at in At(form).down() if at.weights}
    assert found == {"", "a", "a.body", "b", "b.left", "b.right"}
    assert {at.path for at in At(form).down() if at.body} == {"a.body", "b.left", "b.right"}


def test_masks_are_decoded_only_when_asked_for() -> None:
    form = Masked(
        Dense(torch.ones(2, dtype=torch.bool)), Affine(Dense(torch.ones(2).char()), Dense(torch.ones(1, 1)))
    )
    with mock.patch.object(Dense, "decode", side_effect=AssertionError):
        assert len(list(At(form).down())) == 5


@given(forms())
def test_unchanged_nodes_are_the_same_objects(form: Form) -> None:
    assert At(form).rebuilt(lambda at: None) is form
    if not any(isinstance(node, Coded) for _, node in form.walk()):
        assert uncoded(form) is form


def test_change_is_called_from_the_root_down_and_not_below_a_changed_node() -> None:
    w, asked = Dense(torch.ones(2)), []

    def change(at: At) -> Form | None:
        asked.append(at.path)
        return Dense(torch.zeros(2)) if at.path == "a" else None

    form = Sum(Sum(w, w), Sum(w, w))
    after = At(form).rebuilt(change)
    assert asked == ["", "a", "b", "b.a", "b.b"]
    assert after.decode().tolist() == [2.0, 2.0]
    assert after.children()["b"] is form.b
