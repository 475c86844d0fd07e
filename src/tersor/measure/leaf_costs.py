"""Leaf costs: the bytes of each array of a form, compared with the order-0 entropy of its elements.

order0      as in bits.py, by order0.py: frequency tables, coder states and headers go above it
Hidden elements are not counted. Cost: the leaf is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tersor.forms import At, Form
from tersor.measure.order0 import order0_bits

LARGEST = 1e307
BINS = 48  # of a histogram, if there are more values


@dataclass(frozen=True)
class LeafCost:
    """One array of a form, as it is stored."""

    path: str  # "" for the root, else "body.index"
    form: str  # its kind: "coded", "dense"
    dtype: str
    count: int  # stored elements
    nbytes: int
    order0: float  # bits
    low: float  # of the histogram's first bin
    high: float  # of its last
    counts: tuple[int, ...]  # elements in bins of equal width; one bin for each value if there are few


def leaf_costs_of(form: Form, plain: Form | None = None) -> Iterator[LeafCost]:
    """The leaves of a form in the order of its tree. `plain`: the form without coded leaves, if there is one
    already."""
    for at, stored in zip(At(form if plain is None else plain).down(), nodes(form), strict=True):
        if not stored.children():
            array = at.node.decode(at.keep)
            array = (array if at.keep is None else array[at.keep]).cpu()
            dtype = str(array.dtype).removeprefix("torch.")
            order0, bins = order0_bits(array), histogram(array)
            yield LeafCost(at.path, stored.name, dtype, array.numel(), stored.nbytes, order0, *bins)


def nodes(form: Form) -> Iterator[Form]:
    return (node for _, node in form.walk())


def histogram(array: Tensor) -> tuple[float, float, tuple[int, ...]]:
    """(middle of the first bin, middle of the last, counts) of the finite values. No bins for complex
    ones."""
    if array.is_complex():
        return 0.0, 0.0, ()
    values = as_doubles(array)
    if not len(values):
        return 0.0, 0.0, ()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low, high, (len(values),)
    if high / 2 - low / 2 > LARGEST:  # the width of the bins would overflow
        return low, high, ()
    whole = not array.is_floating_point()
    bins = int(high - low) + 1 if whole and high - low < BINS else BINS
    edge = 0.5 if whole else 0.0
    counts, edges = np.histogram(values, bins=bins, range=(low - edge, high + edge))
    half = (edges[1] - edges[0]) / 2
    return float(edges[0] + half), float(edges[-1] - half), tuple(counts.tolist())


def as_doubles(array: Tensor) -> np.ndarray:
    """The finite elements, float64 [N]."""
    flat = array.reshape(-1).double().numpy()
    return flat[np.isfinite(flat)]
