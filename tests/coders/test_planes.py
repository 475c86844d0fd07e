"""Planes: elements of 1 to 8 bytes split into byte planes and joined again, rotated or not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders.bytes.planes import Plane, join, plane_of


def slow(data: bytes, itemsize: int, turned: bool) -> list[list[int]]:
    """The bytes of each element as an integer, rotated left by one bit if `turned`."""
    found: list[list[int]] = [[] for _ in range(itemsize)]
    for at in range(0, len(data), itemsize):
        number, bits = int.from_bytes(data[at : at + itemsize], "little"), 8 * itemsize
        if turned:
            number = (number << 1 | number >> bits - 1) % (1 << bits)
        for k in range(itemsize):
            found[k].append(number >> 8 * k & 255)
    return found


@pytest.mark.parametrize(
    ("itemsize", "turned"), [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)]
)
def test_join_is_the_inverse_of_plane_of(itemsize: int, turned: bool) -> None:
    @given(st.integers(0, 70), st.integers(0, 2**32 - 1))
    def check(count: int, seed: int) -> None:
        data = np.random.default_rng(seed).integers(0, 256, count * itemsize).astype(np.uint8)
        found = [plane_of(data, itemsize, k, turned=turned) for k in range(itemsize)]
        assert [plane.tolist() for plane in found] == slow(data.tobytes(), itemsize, turned)
        out = np.empty_like(data)
        join(found, itemsize, out, turned=turned)
        assert (out == data).all()

    check()


@given(st.integers(0, 40), st.integers(-3, 45), st.integers(-3, 45))
def test_slices_of_a_plane(count: int, begin: int, end: int) -> None:
    data = np.random.default_rng(count).integers(0, 256, count * 4).astype(np.uint8)
    asked = []

    def read(a: int, b: int) -> np.ndarray:
        asked.append((a, b))
        return data[4 * a : 4 * b]

    plane = Plane(read, count, 4, 2, turned=False)
    assert len(plane) == count
    part = slice(max(begin, 0), max(end, 0))
    assert plane[part].tolist() == data[2::4][part].tolist()
    assert all(0 <= a <= b <= count for a, b in asked)
