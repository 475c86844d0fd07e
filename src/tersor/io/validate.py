"""Validate: check that a tree of forms can be decoded, before it is. docs/format.md section 6.

structure    shapes, dtypes and settings of all nodes, from header and text; adds up elements
contents     values of decoded leaves: indices within their table, codes within their levels
Each form defines its own rules: Form.fact and Form.bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.dtypes import CODED, FLOATS, INTEGERS
from tersor.errors import FormatError
from tersor.forms import At, Coded, Dense, Form, Grid, uncoded
from tersor.forms.form import SLICE, Fact, Shape
from tersor.io.header import AXES
from tersor.maths.uniform_grid import code_limits
from tersor.model.sites import Site
from tersor.record.node_json import DEPTH

GRACE, JUSTIFIED = 1 << 24, 1024  # elements that any file may declare, and elements per byte


def structure(form: Form, site: Site, expected: Shape | None = None) -> int:
    """Refuse a tree that does not decode to its site's dtype and the shape `expected` (default: as given).
    Returns the number of elements of all its nodes, and of what their decoding costs besides."""
    found: dict[str, Fact] = {}
    work = 0

    def visit(at: At, depth: int) -> Fact:
        nonlocal work
        where = f"{site.name}:{at.path}" if at.path else site.name
        demand(depth <= DEPTH, where, f"forms nested deeper than {DEPTH}")
        facts = {key: visit(child, depth + 1) for key, child in at.below()}
        try:
            fact = at.node.fact(facts, found[at.masks[-1]].shape if at.masks else None)
        except FormatError as error:
            raise FormatError(f"{where[:200]}: {error}") from None
        demand(not at.path or fact.dtype in CODED.values(), where, f"{fact.dtype} is for the root only")
        demand(len(fact.shape) <= AXES, where, f"{len(fact.shape)} axes, but at most {AXES} are read")
        found[at.path] = fact
        work += math.prod(fact.shape) + at.node.work(facts)
        return fact

    shape, dtype = visit(At(form), 0)
    expected = site.shape if expected is None else expected
    demand(shape == expected, site.name, f"decodes to {list(shape)}, the site has {list(expected)}")
    same = dtype is site.torch_dtype or (dtype in FLOATS and site.torch_dtype in FLOATS)
    demand(same, site.name, f"decodes to {dtype}, the site has torch.{site.dtype}")
    return work


def grid_structure(grid: Grid, edge: str) -> int:
    """Refuse a grid that no edge can have. Returns its number of elements."""
    if grid.scale is None:
        fine = grid.zero is None and grid.replace(stale=False).settings() == {}
        demand(fine, edge, "a grid without a scale is dynamic: it has 8 bits, and no other setting")
        return 0
    scale = structure_of(grid.scale, edge)
    fine = scale.dtype is torch.float32 and len(scale.shape) == 1 and scale.shape[0] > 0
    demand(fine, edge, f"a scale of {scale.dtype} {list(scale.shape)}, but it is float32 of one axis")
    if grid.zero is not None:
        zero = structure_of(grid.zero, edge)
        fine = zero.shape == scale.shape and zero.dtype in INTEGERS
        demand(fine, edge, f"a zero of {zero.dtype} {list(zero.shape)} for a scale of {list(scale.shape)}")
    demand(1 <= grid.bits <= 16, edge, f"bits {grid.bits}, but 1 to 16 are read")
    leaves = [leaf for leaf in (grid.scale, grid.zero) if leaf is not None]
    return scale.shape[0] * len(leaves) + sum(leaf.work({}) for leaf in leaves)


def grid_contents(grid: Grid, edge: str) -> None:
    """FormatError for a scale that is not finite and above 0, and for a zero point that is not a code."""
    if grid.scale is None:
        return
    scale = grid.scale.decode()
    demand(bool((scale.isfinite() & (scale > 0)).all()), edge, "a scale that is not a number above 0")
    if grid.zero is not None:
        within(grid.zero.decode(), *code_limits(grid.bits, grid.signed), edge, "a zero is one of the codes")


def structure_of(leaf: Form, edge: str) -> Fact:
    demand(isinstance(leaf, (Dense, Coded)), edge, f"a {leaf.name} in a grid, whose children must be leaves")
    return leaf.fact({}, None)


def limit_for(nbytes: int) -> int:
    """Elements that a file of this many bytes may declare."""
    return GRACE + JUSTIFIED * nbytes


def contents(form: Form, site: Site) -> Tensor:
    """The decoded tensor in its site's dtype. FormatError if a code is outside its table."""
    return plain_of(form, site).decode().to(site.torch_dtype)


def plain_of(form: Form, site: Site) -> Form:
    """The form without coded leaves. FormatError if a code is outside its table."""
    plain = uncoded(form)
    for path, node in plain.walk():
        where = f"{site.name}:{path}" if path else site.name
        for key, (low, high, what) in node.bounds().items():
            within(node.children()[key].decode(), low, high, where, what)
    return plain


def slices(form: Form, site: Site) -> Iterator[Tensor]:
    """The decoded tensor, flat, SLICE elements at a time. A leaf is not decoded whole for it."""
    if not form.children():
        return (part.to(site.torch_dtype) for part in form.slices())
    return iter(contents(form, site).reshape(-1).split(SLICE))


def within(codes: Tensor, low: int, high: int, where: str, what: str) -> None:
    if codes.numel():
        least, most = (int(value) for value in codes.aminmax())
        demand(low <= least and most <= high, where, f"codes {least} to {most}, but {what} {low} to {high}")


def demand(holds: bool, where: str, otherwise: str) -> None:
    if not holds:
        raise FormatError(f"{where[:200]}: {otherwise}")
