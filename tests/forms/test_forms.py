"""Every form: decoding compared with slow loops, cutting, sizes, digests, flattening, walking."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_forms import BUILDERS, SLOW, Draw, close, forms, slow

from tersor.errors import FormatError
from tersor.forms import FORMS, Affine, Codebook, Coded, Dense, Form, LogGrid, LowRank, Masked, Sum
from tersor.record.node_json import DEPTH, flatten, unflatten

each_form = pytest.mark.parametrize("name", FORMS)


def test_every_form_has_a_builder_and_a_slow_decoder() -> None:
    for name in FORMS:
        assert name in BUILDERS, f"form {name!r}: say in BUILDERS of tests/random_forms.py how one is drawn"
        assert name in SLOW, f"form {name!r}: decode it by loops in SLOW of tests/random_forms.py"
        assert name in GOLDEN, f"form {name!r}: pin an instance and its digest in GOLDEN of test_forms.py"


@each_form
def test_decode_is_the_slow_loop(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        w = form.decode()
        assert form.shape == tuple(w.shape)
        assert close(w, slow(form), form)

    check()


def arrays_of(form: Form) -> Iterator[torch.Tensor]:
    """Every array in the tree, found by the fields alone."""
    for field in dataclasses.fields(form):
        value = getattr(form, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Form):
            yield from arrays_of(value)


def test_a_table_for_the_one_row_there_is_follows_repeats() -> None:
    index, twice = Dense(torch.tensor([[1, 0, 1]], dtype=torch.uint8)), torch.tensor([0, 0])
    form = Codebook(index, Dense(torch.tensor([[2.0, 3.0]])), Dense(torch.tensor([[0.5]])))
    assert form.take(0, twice).decode().tolist() == [[1.5, 1.0, 1.5]] * 2


@each_form
def test_nbytes_counts_every_array(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        assert form.nbytes == sum(math.prod(a.shape) * a.element_size() for a in arrays_of(form))

    check()


# --- digest ---


def rebuilt(form: Form) -> Form:
    """An equal form with other tensors and another memory layout."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(form):
        value = getattr(form, field.name)
        if isinstance(value, Form):
            value = rebuilt(value)
        elif isinstance(value, torch.Tensor):
            value = value.clone() if value.ndim < 2 else value.transpose(0, 1).contiguous().transpose(0, 1)
        fields[field.name] = value
    return type(form)(**fields)


def changes(form: Form) -> Iterator[tuple[str, Form]]:
    """Forms that differ in one byte, dtype, shape or setting, with the name of the change."""
    for field in dataclasses.fields(form):
        value = getattr(form, field.name)
        if isinstance(value, Form):
            for what, other in changes(value):
                yield f"{field.name}.{what}", form.replace(**{field.name: other})
        elif isinstance(value, torch.Tensor):
            flat = value.clone().contiguous().reshape(-1)
            if flat.numel():
                raw = flat.view(torch.uint8)
                raw[-1] ^= 1
                yield f"{field.name}: last byte", form.replace(**{field.name: flat.reshape(value.shape)})
            yield f"{field.name}: shape", form.replace(**{field.name: value.reshape(1, *value.shape)})
            other = torch.uint8 if value.dtype is torch.int8 else torch.int8
            if value.element_size() == 1:
                yield f"{field.name}: dtype", form.replace(**{field.name: value.view(other)})
        elif isinstance(value, bool):
            yield field.name, form.replace(**{field.name: not value})
        elif isinstance(value, int):
            yield field.name, form.replace(**{field.name: value + 1})
        elif isinstance(value, str):
            yield field.name, form.replace(**{field.name: value + "x"})
        elif isinstance(value, tuple):
            yield field.name, form.replace(**{field.name: (*value, 1)})


@each_form
def test_any_change_changes_the_digest(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        found = {form.digest: "the form itself"}
        for what, other in changes(form):
            assert other.digest not in found, f"{what} has the digest of {found[other.digest]}"
            found[other.digest] = what

    check()


@each_form
def test_equal_forms_have_equal_digests(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        assert rebuilt(form).digest == form.digest

    check()


def test_digest_distinguishes_children() -> None:
    a, b = Dense(torch.zeros(2)), Dense(torch.ones(2))
    assert Sum(a, b).digest != Sum(b, a).digest
    assert Sum(a, b).digest != LowRank(a, b).digest
    assert Affine(a, b).digest != Affine(a, b, a).digest


# Digests that files and journals depend on: equal in every version and on every machine.
CODES = Dense(torch.tensor([[-2, 0, 1], [1, -1, 0]], dtype=torch.int8))
BITS = Dense(torch.tensor([[True, False, True], [False, True, True]]))
ROWS = Dense(torch.tensor([[0.5], [0.25]]))
W = Dense(torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, -0.125]]))
GOLDEN: dict[str, tuple[Form, str]] = {
    "dense": (W, "f4dbec417b5b8adb"),
    "coded": (Coded(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), (2, 3), "int8", (4,)), "9c4e070ba8f7ee78"),
    "masked": (Masked(BITS, W), "3ba9e60e67a673d5"),
    "affine": (
        Affine(CODES, ROWS, Dense(torch.tensor([[1], [0]], dtype=torch.int16)), 2),
        "7bb25422c4251419",
    ),
    "codebook": (
        Codebook(Dense(torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)), ROWS, None, 1),
        "305326880adce5d0",
    ),
    "loggrid": (LogGrid(CODES, ROWS, 3, 2), "b9ad967438335ebd"),
    "lowrank": (LowRank(ROWS, Dense(torch.tensor([[1.0, 2.0, 3.0]]))), "c187f277206ed92c"),
    "sum": (Sum(W, Affine(CODES, ROWS)), "346afba1f78bd07b"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digest(name: str) -> None:
    form, digest = GOLDEN[name]
    assert form.name == name
    assert form.digest == digest


# --- JSON and arrays ---


@each_form
def test_flatten_has_an_inverse(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        tree, arrays = flatten(form, "a.b")
        back = unflatten(json.loads(json.dumps(tree)), "a.b", arrays.__getitem__, FORMS)
        assert back.digest == form.digest
        assert repr(back) == repr(form)
        assert sum(array.nbytes for array in arrays.values()) == form.nbytes

    check()


@each_form
def test_walk_finds_every_node_by_its_path(name: str) -> None:
    @given(forms(name))
    def check(form: Form) -> None:
        found = dict(form.walk())
        assert found[""] is form
        for path, node in found.items():
            here: Any = form
            for key in path.split(".") if path else ():
                here = getattr(here, key)
            assert here is node
        arrays = flatten(form, "site")[1]
        leaves = {f"site:{path}" if path else "site" for path, node in found.items() if node.arrays()}
        assert arrays.keys() == leaves

    check()


def tree_of(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"form": "dense"}
    for _ in range(depth):
        tree = {"form": "sum", "a": tree, "b": {"form": "dense"}}
    return tree


GRID = {"form": "affine", "codes": tree_of(0), "scale": tree_of(0)}
BAD_TREES: dict[str, tuple[Any, str]] = {
    "no object": (["dense"], "site: a form must be an object with its name"),
    "no name": ({"bits": 4}, "a form must be an object with its name"),
    "name of another type": ({"form": 4}, "a form must be an object with its name"),
    "unknown form": ({"form": "densee"}, "form 'densee' is not known; known are affine"),
    "unknown field": ({"form": "dense", "bits": 4}, "dense has no field 'bits'"),
    "missing child": ({"form": "affine", "codes": {"form": "dense"}}, "site: affine lacks 'scale'"),
    "bad child": (
        {"form": "sum", "a": {"form": "dense"}, "b": {"form": "x"}},
        "site:b: form 'x' is not known",
    ),
    "array in the tree": ({"form": "dense", "array": [1.0]}, "site: dense.array must be Tensor"),
    "bool for int": (GRID | {"bits": True}, "affine.bits must be int"),
    "negative": (GRID | {"axis": -1}, "affine.axis must be int"),
    "null child": (GRID | {"zero": None}, "site:zero: a form must be"),
    "long text": ({"form": "x" * 10_000}, "form 'xxx"),
    "size": ({"form": "coded", "size": [2.5], "dtype": "int8", "planes": [1]}, "coded.size must be"),
    "huge size": ({"form": "coded", "size": [2**60], "dtype": "int8", "planes": [1]}, "coded.size must be"),
    "too deep": (tree_of(DEPTH + 1), "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_bad_tree_is_refused(name: str) -> None:
    tree, says = BAD_TREES[name]
    with pytest.raises(FormatError) as caught:
        unflatten(tree, "site", lambda _: torch.zeros(2), FORMS)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_deepest_tree_is_read() -> None:
    form = unflatten(tree_of(DEPTH), "site", lambda _: torch.ones(2), FORMS)
    assert form.decode().tolist() == [DEPTH + 1.0] * 2


@given(st.sampled_from(sorted(FORMS)), st.data())
def test_printing_names_form_shape_and_settings(name: str, data: st.DataObject) -> None:
    form = BUILDERS[name](
        Draw(data.draw, torch.Generator().manual_seed(0)),
        data.draw(st.sampled_from([(2, 3), (1, 7)])),
        0,
        None,
    )
    text = repr(form)
    assert text.startswith(type(form).__name__ + "(")
    for key, value in form.settings().items():
        assert f"{key}={value!r}" in text
