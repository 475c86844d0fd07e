"""Refine: store the weights inside a form in a new way, and keep the structure around them.

Masks and factors stay; only the nodes that hold the numbers are replaced. Weights that are already quantized
are decoded and encoded again, which loses the old grid. The result is then marked `absorb`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tersor.forms import uncoded
from tersor.forms.at import At
from tersor.forms.dense import Dense
from tersor.forms.form import Form

# (weights, mask of the weights that count or None, axis of rows) -> the new form
Store = Callable[[Tensor, Tensor | None, int], Form]


def refine(form: Form, store: Store, axis: int = 0) -> tuple[Form, str]:
    """(`form` with its weights stored by `store`, "refine", or "absorb" if an old grid was lost)."""
    plain = True

    def change(at: At) -> Form | None:
        nonlocal plain
        if not at.body:
            return None if at.weights else at.node
        plain &= isinstance(at.node, Dense)
        return store(at.node.decode(at.keep), at.keep, at.axis)

    after = At(uncoded(form), axis).rebuilt(change)
    return after, "refine" if plain else "absorb"
