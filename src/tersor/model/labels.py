"""Labels: for each axis of a value that was made of a parameter, which axes of the parameter it holds.

A dimension is a tuple of factors (axes of the parameter, size), slowest first: [O, I, 3, 3] viewed as
[O, I * 9] is (({0}, O),), (({1}, I), ({2}, 3), ({3}, 3)), and viewed back it is what it was. Several axes in
one factor mean that nobody knows any more which of them it is; no axis means that it is the same all along.
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
    """The parameter itself."""
    return tuple(((frozenset({axis}), size),) for axis, size in enumerate(shape))


def axes_of(dim: Iterable[Factor]) -> Axes:
    return frozenset().union(*(axes for axes, _ in dim))


def size_of(dim: Dim) -> int:
    return math.prod(size for _, size in dim)


def of_size(dim: Dim, size: int) -> Dim:
    """A dimension that was sliced, padded or repeated."""
    return dim if size_of(dim) == size else ((axes_of(dim), size),)


def blurred(labels: Labels, shape: Sequence[int]) -> Labels:
    """Of an operator that may have moved anything anywhere."""
    every = frozenset().union(*map(axes_of, labels))
    return tuple(((every, size),) for size in shape)


def viewed(labels: Labels, shape: Sequence[int]) -> Labels:
    """The same elements in the same order, in another shape."""
    if tuple(map(size_of, labels)) == tuple(shape):
        return labels
    left = [factor for dim in labels for factor in dim if factor[1] != 1][::-1]
    made: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        while (room := size // max(size_of(tuple(dim)), 1)) > 1:
            if not left:
                return blurred(labels, shape)
            axes, has = left.pop()
            part = math.gcd(has, room)
            if part not in (has, room):
                return blurred(labels, shape)
            if part < has:
                left.append((axes, has // part))
            dim.append((axes, part))
        made.append(tuple(dim) or ((NONE, size),))
    return tuple(made)


def together(one: Labels, other: Labels, shape: Sequence[int]) -> Labels:
    """Two values of one parameter, combined element by element with broadcasting."""
    a, b = aligned(one, shape), aligned(other, shape)
    return tuple(
        y if not axes_of(x) or (axes_of(y) and len(y) > len(x)) else x for x, y in zip(a, b, strict=True)
    )


def aligned(labels: Labels, shape: Sequence[int]) -> Labels:
    """Broadcast to a shape: what is the same all along has no axis."""
    missing = tuple(((NONE, 1),) for _ in range(len(shape) - len(labels)))
    return tuple(
        ((NONE, size),) if size_of(dim) != size else dim
        for dim, size in zip((*missing, *labels)[-len(shape) :] if shape else (), shape, strict=True)
    )
