"""Validate: whether a tree of forms can be decoded at all, before anything is. docs/format.md section 6.

structure    shapes, dtypes and settings of every node, as header and text tell them; adds up elements
contents     what only the decoded leaves show: indices within their table, codes within their levels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.errors import FormatError
from tersor.forms import (
    Codebook,
    Coded,
    Dense,
    Form,
    LogGrid,
    Masked,
    uncoded,
)
from tersor.forms.coded import DTYPES
from tersor.forms.flat import DEPTH
from tersor.forms.form import SLICE
from tersor.io.header import AXES
from tersor.model.sites import Site

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
GRACE, JUSTIFIED = 1 << 24, 1024  # elements that any file may declare, and those that each byte justifies

Shape = tuple[int, ...]


class Fact(NamedTuple):
    """What a node decodes to."""

    shape: Shape
    dtype: torch.dtype


def structure(form: Form, site: Site, expected: Shape | None = None) -> int:
    """Refuse a tree that cannot be decoded to its site, of which the shape as it is stored is `expected` (default: as given).
    Returns the elements of all its nodes."""
    total = 0

    def visit(node: Form, path: str, keep: Shape | None, depth: int) -> Fact:
        nonlocal total
        where = f"{site.name}:{path}" if path else site.name
        demand(depth <= DEPTH, where, f"forms nested deeper than {DEPTH}")
        demand(node.name in RULES, where, f"no rule for the form {node.name}")
        facts: dict[str, Fact] = {}
        for key, child in node.children().items():
            # A mask narrows what lies below it; the rest hands down the mask it got.
            inner = facts["keep"].shape if key == "body" and isinstance(node, Masked) else keep
            below = inner if key in node.aligned else None
            facts[key] = visit(child, f"{path}.{key}" if path else key, below, depth + 1)
        fact = RULES[node.name](node, facts, keep, where)
        demand(not path or fact.dtype in DTYPES.values(), where, f"{fact.dtype} is stored by itself only")
        demand(len(fact.shape) <= AXES, where, f"{len(fact.shape)} axes, and {AXES} are read")
        total += math.prod(fact.shape)
        return fact

    shape, dtype = visit(form, "", None, 0)
    expected = site.shape if expected is None else expected
    demand(shape == expected, site.name, f"decodes to {list(shape)}, the site has {list(expected)}")
    same = dtype is site.torch_dtype or (dtype in FLOATS and site.torch_dtype in FLOATS)
    demand(same, site.name, f"decodes to {dtype}, the site has torch.{site.dtype}")
    return total


def limit_for(nbytes: int) -> int:
    """Elements that a file of so many bytes may declare."""
    return GRACE + JUSTIFIED * nbytes


def contents(form: Form, site: Site) -> Tensor:
    """The decoded tensor in its site's dtype; FormatError where a code points outside its table."""
    plain = uncoded(form)
    for path, node in plain.walk():
        where = f"{site.name}:{path}" if path else site.name
        if isinstance(node, Codebook):
            within(node.index.decode(), 0, node.book.shape[-1] - 1, where, "table entries")
        if isinstance(node, LogGrid):
            top = 2 ** (node.bits - 1) - 1
            within(node.codes.decode(), -top, top, where, "levels")
    return plain.decode().to(site.torch_dtype)


def slices(form: Form, site: Site) -> Iterator[Tensor]:
    """The same, flat, SLICE elements at a time; a leaf is not made whole for it."""
    if isinstance(form, (Dense, Coded)):
        return (part.to(site.torch_dtype) for part in form.slices())
    return iter(contents(form, site).reshape(-1).split(SLICE))


def within(codes: Tensor, low: int, high: int, where: str, what: str) -> None:
    if codes.numel():
        least, most = (int(value) for value in codes.aminmax())
        demand(low <= least and most <= high, where, f"codes {least} to {most}, but {what} {low} to {high}")


def demand(holds: bool, where: str, otherwise: str) -> None:
    if not holds:
        raise FormatError(f"{where[:200]}: {otherwise}")


def rows_of(shape: Shape, axis: int, where: str) -> tuple[int, int]:
    """(O, I) of a tensor seen as a matrix."""
    demand(0 <= axis < max(len(shape), 1), where, f"axis {axis} of {list(shape)}")
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[axis], math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])


def check_table(fact: Fact, rows: int, columns: int, group: int, where: str) -> None:
    """A scale or zero: one a tensor, one a row, or one a group."""
    allowed = {(1, 1), (rows, 1)} | ({(rows, -(-columns // group))} if group else set())
    demand(fact.shape in allowed, where, f"a table of {list(fact.shape)} for {rows} rows of {columns}")


def dense(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    return Fact(node.shape, node.dtype)


def coded(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    demand(node.dtype in DTYPES, where, f"dtype {node.dtype!r} is not coded; coded are {', '.join(DTYPES)}")
    dtype, planes = DTYPES[node.dtype], node.planes
    demand(len(planes) == dtype.itemsize, where, f"{len(planes)} streams for {node.dtype}")
    data = node.data
    fine = data.dtype is torch.uint8 and data.ndim == 1 and sum(planes) == len(data)
    demand(fine, where, f"streams of {list(planes)} bytes in {data.dtype} {list(data.shape)}")
    demand(not node.pack or dtype is torch.bool, where, f"eight {node.dtype} do not make a byte")
    demand(not node.kept or keep == node.shape, where, "kept, but no mask of its shape stands above it")
    return Fact(node.shape, dtype)


def masked(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    mask, body = facts["keep"], facts["body"]
    demand(mask.dtype is torch.bool, where, f"a mask of {mask.dtype}")
    demand(mask.shape == body.shape, where, f"mask {list(mask.shape)}, body {list(body.shape)}")
    return body


def grid(
    facts: Mapping[str, Fact], codes: str, dtypes: tuple[torch.dtype, ...], node: Any, where: str
) -> tuple[int, int]:
    """What affine, codebook and loggrid have in common. Returns the codes' rows and columns."""
    demand(facts[codes].dtype in dtypes, where, f"{codes} of {facts[codes].dtype}")
    rows, columns = rows_of(facts[codes].shape, node.axis, where)
    if "scale" in facts:
        demand(facts["scale"].dtype in FLOATS, where, f"scale of {facts['scale'].dtype}")
        check_table(facts["scale"], rows, columns, node.group, where)
    return rows, columns


def affine(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    grid(facts, "codes", (torch.int8, torch.int16), node, where)
    demand(1 <= node.bits <= 16, where, f"bits {node.bits}, but 1 to 16 are read")
    if "zero" in facts:
        demand(facts["zero"].dtype in INTEGERS, where, f"zero of {facts['zero'].dtype}")
        zero, scale = facts["zero"].shape, facts["scale"].shape
        demand(zero == scale, where, f"zero {list(zero)}, scale {list(scale)}")
    return Fact(facts["codes"].shape, facts["scale"].dtype)


def codebook(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    rows, _ = grid(facts, "index", (torch.uint8, torch.int16), node, where)
    book = facts["book"]
    fine = len(book.shape) == 1 or (len(book.shape) == 2 and book.shape[0] == rows)
    demand(fine and book.shape[-1] >= 1, where, f"a table of {list(book.shape)} for {rows} rows")
    demand(book.dtype in FLOATS, where, f"a table of {book.dtype}")
    return Fact(facts["index"].shape, wider(book, facts.get("scale", book)))


def loggrid(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    grid(facts, "codes", (torch.int8,), node, where)
    fine = 2 <= node.bits <= 8 and node.terms in (1, 2)
    demand(fine, where, f"bits {node.bits}, terms {node.terms}, but 2 to 8 and 1 or 2 are read")
    return Fact(facts["codes"].shape, facts["scale"].dtype)


def lowrank(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    left, right = facts["left"], facts["right"]
    fine = len(left.shape) == 2 and len(right.shape) >= 1 and left.shape[1] == right.shape[0]
    demand(fine, where, f"a product of {list(left.shape)} and {list(right.shape)}")
    demand(
        left.dtype is right.dtype and left.dtype in FLOATS, where, f"factors of {left.dtype}, {right.dtype}"
    )
    return Fact((left.shape[0], *right.shape[1:]), left.dtype)


def total(node: Any, facts: Mapping[str, Fact], keep: Shape | None, where: str) -> Fact:
    a, b = facts["a"], facts["b"]
    demand(a.shape == b.shape, where, f"a sum of {list(a.shape)} and {list(b.shape)}")
    demand(a.dtype in FLOATS and b.dtype in FLOATS, where, f"a sum of {a.dtype} and {b.dtype}")
    return Fact(a.shape, wider(a, b))


def wider(a: Fact, b: Fact) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


Rule = Callable[[Any, Mapping[str, Fact], Shape | None, str], Fact]
RULES: dict[str, Rule] = {
    "dense": dense, "coded": coded, "masked": masked, "affine": affine, "codebook": codebook,
    "loggrid": loggrid, "lowrank": lowrank, "sum": total,
}  # fmt: skip
