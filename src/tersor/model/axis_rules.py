"""Axis rules: how an operator that passes a parameter on changes the origins of its axes."""

from __future__ import annotations

from torch import fx

from tersor.model.axis_origins import NONE, Labels, aligned, axes_of, blurred, of_size, viewed
from tersor.model.graph import values
from tersor.model.parameter_use import Use


def same(use: Use) -> Labels:
    """Elementwise operators: broadcast if the shape is larger."""
    fits = len(use.labels) <= len(use.shape)
    return aligned(use.labels, use.shape) if fits else blurred(use.labels, use.shape)


def view(use: Use) -> Labels:
    return viewed(use.labels, use.shape)


def permute(use: Use) -> Labels:
    return tuple(use.labels[at] for at in use.arg("dims"))


def transpose(use: Use) -> Labels:
    labels = list(use.labels)
    keys = [key for key in ("dim0", "dim1", "axis0", "axis1") if key in use.given]
    a, b = (use.given[key] for key in keys) if keys else (-2, -1)
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def reverse(use: Use) -> Labels:
    return use.labels[::-1]


def movedim(use: Use) -> Labels:
    old = use.arg("source", use.arg("src"))
    new = use.arg("destination", use.arg("dst"))
    pairs = list(zip([old], [new], strict=True)) if isinstance(old, int) else list(zip(old, new, strict=True))
    count = len(use.labels)
    moved = {b % count: a % count for a, b in pairs}
    rest = iter([at for at in range(count) if at not in moved.values()])
    return tuple(use.labels[moved[at] if at in moved else next(rest)] for at in range(count))


def select(use: Use) -> Labels:
    at = use.dim()
    return use.labels[:at] + use.labels[at + 1 :]


def resized(use: Use) -> Labels:
    """slice, narrow, flip, roll, pad, repeat, cat: the same axes with other lengths."""
    missing = tuple(((NONE, 1),) for _ in range(len(use.shape) - len(use.labels)))
    labels = (*missing, *use.labels)
    if len(labels) != len(use.shape):
        return blurred(use.labels, use.shape)
    return tuple(of_size(dim, size) for dim, size in zip(labels, use.shape, strict=True))


def parts(use: Use) -> list[Labels]:
    """split, chunk: each part has all axes."""
    return [
        tuple(of_size(dim, int(size)) for dim, size in zip(use.labels, part.shape, strict=True))
        for part in values(use.node)
    ]


def unbind(use: Use) -> list[Labels]:
    return [select(use)] * len(values(use.node))


def stack(use: Use) -> Labels:
    at = use.arg("dim", 0) % len(use.shape)
    return (*use.labels[:at], ((NONE, use.shape[at]),), *use.labels[at:])


def reduced(use: Use) -> Labels:
    """sum, mean, norm: the reduced axes are removed, or have size 1."""
    dims = use.arg("dim")
    count = len(use.labels)
    each = range(count) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    removed = {d % count for d in each}
    if len(use.shape) == count:
        return tuple(((NONE, 1),) if at in removed else dim for at, dim in enumerate(use.labels))
    kept = tuple(dim for at, dim in enumerate(use.labels) if at not in removed)
    return kept if len(kept) == len(use.shape) else blurred(use.labels, use.shape)


def looked_up(use: Use) -> Labels:
    """Rows picked by constant indices: every axis of the indices holds the row axis of the parameter."""
    at = use.dim() if use.name in ("index_select", "gather") else 0
    if use.name == "index":
        places = [n for n, index in enumerate(use.arg("indices") or []) if isinstance(index, fx.Node)]
        if len(places) != 1:
            return blurred(use.labels, use.shape)
        at = places[0]
    more = len(use.shape) - len(use.labels) + 1
    if use.slot not in ("weight", "self") or more < 0:
        return blurred(use.labels, use.shape)
    rows = tuple(((axes_of(use.labels[at]), size),) for size in use.shape[at : at + more])
    return use.labels[:at] + rows + use.labels[at + 1 :]
