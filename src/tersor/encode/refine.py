"""Refine: store a form's weights anew and let the structure around them stand.

A mask stays a mask, factors stay factors: only what holds the numbers is replaced. A grid that is already
there is decoded and encoded anew, which loses it: that is `absorb`, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tersor.forms import uncoded
from tersor.forms.at import At
from tersor.forms.dense import Dense
from tersor.forms.form import Form

# (weights, mask of those that count or None, axis of rows) -> how to store them
Store = Callable[[Tensor, Tensor | None, int], Form]


def refine(form: Form, store: Store, axis: int = 0) -> tuple[Form, str]:
    """`form` with its weights stored by `store`, and how: "refine", or "absorb" where a grid was given up."""
    plain = True

    def change(at: At) -> Form | None:
        nonlocal plain
        if not at.body:
            return None if at.weights else at.node
        plain &= isinstance(at.node, Dense)
        return store(at.node.decode(at.keep), at.keep, at.axis)

    after = At(uncoded(form), axis).rebuilt(change)
    return after, "refine" if plain else "absorb"
