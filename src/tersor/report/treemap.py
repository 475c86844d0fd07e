"""Treemap: areas as rectangles that tile a box and are nearly squares.

squarified: rows along the shorter side, extended while aspect ratios improve     Bruls, Huizing, van Wijk
2000 area of a rectangle / area of the box = its area / sum of the areas; cost N log N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle: its upper left corner, width, height."""

    x: float
    y: float
    w: float
    h: float

    def shrunk(self, gap: float) -> Box:
        """The box with a gap on each side, or with size 0 if it is too small for that."""
        return Box(self.x + gap, self.y + gap, max(self.w - 2 * gap, 0), max(self.h - 2 * gap, 0))


def squarify(areas: Sequence[float], box: Box) -> list[Box]:
    """A rectangle for each area, in the order of the areas, which are 0 or more. An area of 0 has no size."""
    found = [Box(box.x, box.y, 0, 0)] * len(areas)
    order = [n for n in sorted(range(len(areas)), key=lambda n: -areas[n]) if areas[n] > 0]
    left = float(sum(areas[n] for n in order))  # not placed yet
    while order and box.w > 0 and box.h > 0:
        scale = box.w * box.h / left
        count = row_length([areas[n] * scale for n in order], min(box.w, box.h))
        row, order = order[:count], order[count:]
        total = sum(areas[n] for n in row)
        left -= total
        upright = box.w >= box.h
        strip, box = cut(box, total / (total + left) if order else 1.0, upright)
        for n, place in zip(row, divided([areas[n] / total for n in row], strip, upright), strict=True):
            found[n] = place
    return found


def row_length(areas: Sequence[float], side: float) -> int:
    """How many of the areas, largest first, go into one row along the side: areas are added while the worst
    aspect ratio falls."""
    total, best = 0.0, float("inf")
    for count, area in enumerate(areas):
        total += area
        worst = max(side**2 * areas[0] / total**2, total**2 / (side**2 * area))
        if worst > best:
            return count
        best = worst
    return len(areas)


def cut(box: Box, share: float, upright: bool) -> tuple[Box, Box]:
    """(a strip with this share of the box, the rest). An upright strip is cut off the left, else off the
    top."""
    x, y, w, h = box
    if upright:
        wide = w * share
        return Box(x, y, wide, h), Box(x + wide, y, w - wide, h)
    high = h * share
    return Box(x, y, w, high), Box(x, y + high, w, h - high)


def divided(shares: Sequence[float], strip: Box, upright: bool) -> list[Box]:
    """The strip in pieces, one after the other along it."""
    x, y, w, h = strip
    found, at = [], 0.0
    for share in shares:
        place = Box(x, y + h * at, w, h * share) if upright else Box(x + w * at, y, w * share, h)
        found.append(place)
        at += share
    return found
