"""Axis origins: for each axis of a value computed from a parameter, the parameter axes that it holds.

A dimension is a tuple of factors (axes of the parameter, size), slowest first: [O, I, 3, 3] viewed as [O, I *
9] is (({0}, O),), (({1}, I), ({2}, 3), ({3}, 3)), and a view back restores the first origins. A factor with
several axes holds one of them, but it is unknown which. A factor without an axis is constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Axes = frozenset[int]
Factor = tuple[Axes, int]
Dim = tuple[Factor, ...]
Labels = tuple[Dim, ...]

NONE: Axes = frozenset()


def of_shape(shape: Sequence[int]) -> Labels:
    """The labels of the parameter itself."""
    return tuple(((frozenset({axis}), size),) for axis, size in enumerate(shape))


def axes_of(dim: Iterable[Factor]) -> Axes:
    return frozenset().union(*(axes for axes, _ in dim))


def size_of(dim: Dim) -> int:
    return math.prod(size for _, size in dim)


def of_size(dim: Dim, size: int) -> Dim:
    """The label of a dimension after it was sliced, padded or repeated."""
    return dim if size_of(dim) == size else ((axes_of(dim), size),)


def blurred(labels: Labels, shape: Sequence[int]) -> Labels:
    """The labels after an operator that may have moved any element anywhere."""
    every = frozenset().union(*map(axes_of, labels))
    return tuple(((every, size),) for size in shape)


def viewed(labels: Labels, shape: Sequence[int]) -> Labels:
    """The labels after a view: the same elements in the same order, in another shape."""
    if tuple(map(size_of, labels)) == tuple(shape):
        return labels
    rest = [factor for dim in labels for factor in dim if factor[1] != 1][::-1]
    dims: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        while (missing := size // max(size_of(tuple(dim)), 1)) > 1:
            if not rest:
                return blurred(labels, shape)
            axes, has = rest.pop()
            part = math.gcd(has, missing)
            if part not in (has, missing):
                return blurred(labels, shape)
            if part < has:
                rest.append((axes, has // part))
            dim.append((axes, part))
        dims.append(tuple(dim) or ((NONE, size),))
    return tuple(dims)


def together(first: Labels, second: Labels, shape: Sequence[int]) -> Labels:
    """The labels of two values of one parameter, combined element by element with broadcasting."""
    a, b = aligned(first, shape), aligned(second, shape)
    return tuple(
        y if not axes_of(x) or (axes_of(y) and len(y) > len(x)) else x for x, y in zip(a, b, strict=True)
    )


def aligned(labels: Labels, shape: Sequence[int]) -> Labels:
    """The labels after broadcasting to a shape. A dimension that was repeated has no axis."""
    missing = tuple(((NONE, 1),) for _ in range(len(shape) - len(labels)))
    return tuple(
        ((NONE, size),) if size_of(dim) != size else dim
        for dim, size in zip((*missing, *labels)[-len(shape) :] if shape else (), shape, strict=True)
    )
