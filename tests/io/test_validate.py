"""Validate: each rule of docs/format.md section 6 by itself, on forms in memory."""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from random_forms import forms
from torch import Tensor

from tersor.errors import FormatError
from tersor.forms import FORMS, Affine, Codebook, Coded, Dense, Form, LogGrid, LowRank, Masked, Sum
from tersor.io.validate import contents, structure
from tersor.model.sites import Site


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Dense:
    return Dense(torch.ones(shape, dtype=dtype))


def codes(*shape: int) -> Dense:
    return ones(*shape, dtype=torch.int8)


def mask(*shape: int) -> Dense:
    return ones(*shape, dtype=torch.bool)


def stream(
    size: tuple[int, ...], dtype: str, planes: tuple[int, ...], data: Tensor | None = None, **more: bool
) -> Coded:
    """Constant streams."""
    made = torch.tensor([1, 1], dtype=torch.uint8).repeat(len(planes))
    return Coded(made if data is None else data, size, dtype, planes, **more)


def site(form: Form, dtype: str = "float32", shape: tuple[int, ...] | None = None) -> Site:
    return Site("w", form.shape if shape is None else shape, dtype, "linear")


@dataclass(frozen=True, eq=False, repr=False)
class Wavelet(Form):
    """A form that the format does not know."""

    name: ClassVar[str] = "wavelet"
    array: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


def deep(levels: int) -> Form:
    form: Form = ones(2)
    for _ in range(levels):
        form = Sum(form, ones(2))
    return form


KEPT = stream((2, 2), "float32", (2, 2, 2, 2), kept=True)
FLOAT8 = torch.float8_e5m2
BAD: list[tuple[Form, str]] = [
    (deep(9), "nested deeper than 8"),
    (Wavelet(torch.ones(2)), "no rule for the form wavelet"),
    (Sum(ones(2), Wavelet(torch.ones(2))), "w:b: no rule for the form wavelet"),
    (Masked(mask(2), ones(2, dtype=FLOAT8)), "w:body: torch.float8_e5m2 is for the root only"),
    (Masked(mask(2), ones(2, dtype=torch.complex64)), "w:body: torch.complex64 is for the root only"),
    (ones(*[1] * 17), "17 axes, but at most 16 are read"),
    # coded
    (stream((2,), "float8_e5m2", (2,)), "dtype 'float8_e5m2' is not coded; coded are bool, uint8"),
    (stream((2,), "int16", (2,)), "1 streams for int16"),
    (stream((2,), "uint8", (2, 2)), "2 streams for uint8"),
    (stream((2,), "uint8", (3,)), r"streams of \[3\] bytes in torch.uint8 \[2\]"),
    (stream((2,), "uint8", (2,), torch.ones(2, dtype=torch.int8)), r"streams of \[2\] bytes in torch.int8"),
    (stream((2,), "uint8", (2,), torch.ones(2, 1, dtype=torch.uint8)), r"bytes in torch.uint8 \[2, 1\]"),
    (stream((2,), "uint8", (2,), pack=True), "pack is set for uint8, but only bool is packed"),
    (stream((2,), "uint8", (2,), kept=True), "no mask of its shape is above it"),
    (Masked(stream((2,), "bool", (2,), kept=True), ones(2)), "w:keep: kept is set, but no mask"),
    (Masked(mask(2, 1), stream((1, 2), "float32", (2,) * 4, kept=True)), "w:body: kept is set, but no mask"),
    (Masked(mask(2, 2), LowRank(KEPT, ones(2, 2))), "left: kept is set, but no"),
    (Masked(mask(2, 2), Affine(codes(2, 2), KEPT, group=1)), "scale: kept is set, but no"),
    (Masked(mask(2), Masked(stream((2,), "bool", (2,), kept=True), ones(2))), "body.keep: kept is set, but"),
    # masked
    (Masked(codes(2), ones(2)), "a mask of torch.int8"),
    (Masked(mask(2), ones(3)), r"mask \[2\], body \[3\]"),
    # affine
    (Affine(ones(2, 2, dtype=torch.uint8), ones(1, 1)), "codes of torch.uint8"),
    (Affine(codes(2, 3), ones(3, 1)), r"a table of \[3, 1\] for 2 rows of 3"),
    (Affine(codes(2, 3), ones(2, 2)), r"a table of \[2, 2\] for 2 rows of 3"),
    (Affine(codes(2, 3), ones(2, 3), group=2), r"a table of \[2, 3\] for 2 rows of 3"),
    (Affine(codes(2, 3), ones(1, 2), group=2), r"a table of \[1, 2\] for 2 rows of 3"),
    (Affine(codes(2, 3), ones(1)), r"a table of \[1\] for 2 rows of 3"),
    (Affine(codes(3), ones(3, 1)), r"a table of \[3, 1\] for 1 rows of 3"),
    (Affine(codes(2, 3), ones(2, 1), axis=1), r"a table of \[2, 1\] for 3 rows of 2"),
    (Affine(codes(2, 3), ones(1, 1), axis=2), r"axis 2 of \[2, 3\]"),
    (Affine(codes(2, 3), ones(1, 1), axis=-1), r"axis -1 of \[2, 3\]"),
    (Affine(codes(3), ones(1, 1), axis=1), r"axis 1 of \[3\]"),
    (Affine(codes(2, 3), codes(1, 1)), "scale of torch.int8"),
    (Affine(codes(2, 3), ones(2, 1), codes(1, 1)), r"zero \[1, 1\], scale \[2, 1\]"),
    (Affine(codes(2, 3), ones(2, 1), ones(2, 1)), "zero of torch.float32"),
    (Affine(codes(2, 3), ones(2, 1), mask(2, 1)), "zero of torch.bool"),
    (Affine(codes(2, 3), ones(2, 1), bits=0), "bits 0, but 1 to 16"),
    (Affine(codes(2, 3), ones(2, 1), bits=17), "bits 17, but 1 to 16"),
    # codebook
    (Codebook(codes(2, 2), ones(3)), "index of torch.int8"),
    (Codebook(ones(2, 2, dtype=torch.uint8), ones(0)), r"a table of \[0\] for 2 rows"),
    (Codebook(ones(2, 2, dtype=torch.uint8), ones(3, 2)), r"a table of \[3, 2\] for 2 rows"),
    (Codebook(ones(2, 2, dtype=torch.uint8), ones(2, 2, 2)), r"a table of \[2, 2, 2\] for 2 rows"),
    (Codebook(ones(2, 2, dtype=torch.uint8), ones()), r"a table of \[\] for 2 rows"),
    (Codebook(ones(2, 2, dtype=torch.uint8), codes(2)), "a table of torch.int8"),
    (Codebook(ones(2, 2, dtype=torch.uint8), ones(2), ones(2, 2)), r"a table of \[2, 2\] for 2 rows of 2"),
    # loggrid
    (LogGrid(ones(2, 2, dtype=torch.int16), ones(1, 1)), "codes of torch.int16"),
    (LogGrid(codes(2, 2), ones(3, 1)), r"a table of \[3, 1\]"),
    (LogGrid(codes(2, 2), ones(1, 1), bits=1), "bits 1, terms 1, but"),
    (LogGrid(codes(2, 2), ones(1, 1), bits=9), "bits 9, terms 1, but"),
    (LogGrid(codes(2, 2), ones(1, 1), terms=3), "bits 4, terms 3, but"),
    # lowrank
    (LowRank(ones(2, 3), ones(2, 2)), r"a product of \[2, 3\] and \[2, 2\]"),
    (LowRank(ones(2, 2, 2), ones(2, 2)), r"a product of \[2, 2, 2\] and \[2, 2\]"),
    (LowRank(ones(2, 2), ones(2, 2, dtype=torch.float64)), "factors of torch.float32, torch.float64"),
    (LowRank(codes(2, 2), codes(2, 2)), "factors of torch.int8, torch.int8"),
    # sum
    (Sum(ones(2), ones(1)), r"a sum of \[2\] and \[1\]"),
    (Sum(ones(2), codes(2)), "a sum of torch.float32 and torch.int8"),
    (Sum(codes(2), ones(2)), "a sum of torch.int8 and torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "said"), BAD, ids=[f"{form.name}, {said[:30]}" for form, said in BAD])
def test_bad_structure(form: Form, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        structure(form, site(form))


def test_right_product_without_axes() -> None:
    with pytest.raises(FormatError, match=r"a product of \[2, 2\] and \[\]"):
        structure(LowRank(ones(2, 2), ones()), Site("w", (2,), "float32", "linear"))


@pytest.mark.parametrize(
    ("form", "dtype", "shape", "said"),
    [
        (ones(2), "float32", (1, 2), r"decodes to \[2\], the site has \[1, 2\]"),
        (ones(2), "int8", (2,), "decodes to torch.float32, the site has torch.int8"),
        (codes(2), "float32", (2,), "decodes to torch.int8, the site has torch.float32"),
        (ones(2, dtype=FLOAT8), "float32", (2,), "decodes to torch.float8_e5m2"),
        (codes(2), "int16", (2,), "decodes to torch.int8, the site has torch.int16"),
    ],
)
def test_form_that_does_not_fit_its_site(form: Form, dtype: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        structure(form, site(form, dtype, shape))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Codebook(Dense(torch.tensor([0, 3], dtype=torch.uint8)), ones(3)), "but table entries 0 to 2"),
        (Codebook(Dense(torch.tensor([0, -1], dtype=torch.int16)), ones(3)), "codes -1 to 0, but table"),
        (Codebook(Dense(torch.tensor([[2]], dtype=torch.uint8)), ones(1, 2)), "codes 2 to 2, but table"),
        (LogGrid(Dense(torch.tensor([8], dtype=torch.int8)), ones(1, 1)), "codes 8 to 8, but levels -7 to 7"),
        (LogGrid(Dense(torch.tensor([-128], dtype=torch.int8)), ones(1, 1), bits=8), "levels -127 to 127"),
        (Sum(ones(1), Codebook(Dense(torch.tensor([9], dtype=torch.uint8)), ones(3))), "w:b: codes 9"),
        (stream((5,), "uint8", (2,), torch.tensor([7, 7], dtype=torch.uint8)), "coded stream"),
    ],
)  # fmt: skip
def test_bad_contents(form: Form, said: str) -> None:
    structure(form, site(form, "uint8" if isinstance(form, Coded) else "float32"))
    with pytest.raises(FormatError, match=said):
        contents(form, site(form))


def spent(node: Form) -> int:
    """What docs/format.md section 9 counts for a node."""
    count = math.prod(node.shape)
    if isinstance(node, LowRank):
        (rows, terms), (_, *columns) = node.left.shape, node.right.shape
        count += rows * terms * math.prod(columns) // 32
    if isinstance(node, Coded):
        begins = itertools.accumulate((0, *node.planes[:-1]))
        mixing = [b for b, n in zip(begins, node.planes, strict=True) if n and int(node.data[b]) % 8 == 5]
        count += 3 * math.prod(node.shape) * len(mixing)
    return count + sum(getattr(node, "runs", ()))


@given(forms())
def test_good_forms_pass_and_every_node_counts(form: Form) -> None:
    decoded = form.decode()
    where = site(form, str(decoded.dtype).removeprefix("torch."))
    assert structure(form, where) == sum(spent(node) for _, node in form.walk())
    found = contents(form, where)
    assert found.dtype == decoded.dtype
    assert torch.equal(found.nan_to_num(), decoded.nan_to_num())


def test_contents_are_in_the_sites_dtype() -> None:
    assert contents(ones(2), site(ones(2), "bfloat16")).dtype is torch.bfloat16


def test_every_form_has_a_rule() -> None:
    assert all(kind.fact is not Form.fact for kind in FORMS.values())


def test_depth_of_eight_is_read() -> None:
    assert structure(deep(8), Site("w", (2,), "float32", "linear")) == 2 * 17
