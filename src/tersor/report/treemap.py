"""Treemap: areas as rectangles that tile a box, as near to squares as may be.

squarified: rows along the shorter side, each as long as that helps     Bruls, Huizing, van Wijk 2000
area of a rectangle / area of the box = its area / sum of the areas; cost N log N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle: its left upper corner, width, height."""

    x: float
    y: float
    w: float
    h: float

    def shrunk(self, gap: float) -> Box:
        """With a gap on each side, or nothing of it where it is too small for that."""
        return Box(self.x + gap, self.y + gap, max(self.w - 2 * gap, 0), max(self.h - 2 * gap, 0))


def squarify(areas: Sequence[float], box: Box) -> list[Box]:
    """A rectangle for each area, in the order of the areas; none is negative. Those of 0 have no size."""
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
    """How many of the areas, largest first, stand best in one row along the side: the worst ratio of two
    sides stops falling there."""
    total, best = 0.0, float("inf")
    for count, area in enumerate(areas):
        total += area
        worst = max(side**2 * areas[0] / total**2, total**2 / (side**2 * area))
        if worst > best:
            return count
        best = worst
    return len(areas)


def cut(box: Box, share: float, upright: bool) -> tuple[Box, Box]:
    """(a strip with this share of the box, the rest); an upright one is cut off the left, else the top."""
    x, y, w, h = box
    if upright:
        wide = w * share
        return Box(x, y, wide, h), Box(x + wide, y, w - wide, h)
    high = h * share
    return Box(x, y, w, high), Box(x, y + high, w, h - high)


def divided(shares: Sequence[float], strip: Box, upright: bool) -> list[Box]:
    """The strip in pieces, one behind the other along it."""
    x, y, w, h = strip
    found, at = [], 0.0
    for share in shares:
        place = Box(x, y + h * at, w, h * share) if upright else Box(x + w * at, y, w * share, h)
        found.append(place)
        at += share
    return found
