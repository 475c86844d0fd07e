"""Refine: store a form's weights anew and let the structure around them stand.

A mask stays a mask, factors stay factors: only what holds the numbers is replaced. A grid that is already
there is decoded and encoded anew, which loses it: that is `absorb`, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tersor.forms.coded import uncoded
from tersor.forms.dense import Dense
from tersor.forms.form import Form
from tersor.forms.lowrank import LowRank
from tersor.forms.masked import Masked
from tersor.forms.sum import Sum

# (weights, mask of those that count or None, axis of rows) -> how to store them
Store = Callable[[Tensor, Tensor | None, int], Form]


def refine(form: Form, store: Store, axis: int = 0) -> tuple[Form, str]:
    """`form` with its weights stored by `store`, and how: "refine", or "absorb" where a grid was given up."""
    how = "refine"

    def visit(node: Form, keep: Tensor | None, axis: int) -> Form:
        nonlocal how
        if isinstance(node, Masked):
            return node.replace(body=visit(node.body, node.within(keep), axis))
        if isinstance(node, LowRank):
            return LowRank(visit(node.left, None, 0), visit(node.right, None, 0))
        if isinstance(node, Sum):
            return Sum(visit(node.a, keep, axis), visit(node.b, keep, axis))
        if not isinstance(node, Dense):
            how = "absorb"
        return store(node.decode(keep), keep, axis)

    return visit(uncoded(form), None, axis), how
