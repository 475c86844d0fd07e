"""The rectangles of a treemap tile the box, and each has the area of its share."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.report.treemap import Box, squarify

AREAS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), max_size=40)
SIDES = st.floats(1, 2000)


def overlap(a: Box, b: Box) -> float:
    wide = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
    high = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
    return max(wide, 0) * max(high, 0)


@given(AREAS, SIDES, SIDES)
def test_areas_are_proportional_and_tile_the_box(areas: list[float], w: float, h: float) -> None:
    boxes = squarify(areas, Box(3, 5, w, h))
    assert len(boxes) == len(areas)
    total = sum(areas)
    for area, box in zip(areas, boxes, strict=True):
        assert box.w * box.h == pytest.approx(
            w * h * area / total if total else 0, rel=1e-6, abs=1e-9 * w * h
        )
        assert box.x >= 3 - 1e-6
        assert box.y >= 5 - 1e-6
        assert box.x + box.w <= 3 + w + 1e-6
        assert box.y + box.h <= 5 + h + 1e-6
    # All are inside, their areas sum to the box, and none overlap: there is no hole either.
    for a, b in itertools.combinations(boxes, 2):
        assert overlap(a, b) <= 1e-6 * w * h


def test_rectangles_of_one_area_are_near_to_squares() -> None:
    for count in (1, 4, 9, 30, 100):
        for box in squarify([1.0] * count, Box(0, 0, 300, 300)):
            assert 1 / 2.5 <= box.w / box.h <= 2.5


def test_the_example_of_the_paper() -> None:
    boxes = squarify([6, 6, 4, 3, 2, 2, 1], Box(0, 0, 6, 4))
    assert boxes[0] == pytest.approx((0, 0, 3, 2))
    assert boxes[1] == pytest.approx((0, 2, 3, 2))
    assert boxes[2] == pytest.approx((3, 0, 12 / 7, 7 / 3))


def test_nothing_and_a_box_of_no_size() -> None:
    assert squarify([], Box(0, 0, 5, 5)) == []
    assert squarify([0.0], Box(0, 0, 5, 5)) == [Box(0, 0, 0, 0)]
    assert squarify([1.0], Box(1, 1, 0, 5)) == [Box(1, 1, 0, 0)]
    assert Box(1, 1, 3, 1).shrunk(1) == Box(2, 2, 1, 0)
