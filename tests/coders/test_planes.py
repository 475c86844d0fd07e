"""Planes: elements of 1 to 8 bytes cut into their bytes and put together again, turned or not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import planes
from tersor.coders.planes import join, split


def slow(data: bytes, itemsize: int, turned: bool) -> list[list[int]]:
    """Each element as a number, turned by one bit, byte by byte."""
    found: list[list[int]] = [[] for _ in range(itemsize)]
    for at in range(0, len(data), itemsize):
        number, bits = int.from_bytes(data[at : at + itemsize], "little"), 8 * itemsize
        if turned:
            number = (number << 1 | number >> bits - 1) % (1 << bits)
        for k in range(itemsize):
            found[k].append(number >> 8 * k & 255)
    return found


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("itemsize", "turned"), [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)]
)
def test_join_is_the_inverse_of_split(
    itemsize: int, turned: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "MANY", 0 if large else 1 << 60)

    @given(st.integers(0, 70), st.integers(0, 2**32 - 1))
    def check(count: int, seed: int) -> None:
        data = np.random.default_rng(seed).integers(0, 256, count * itemsize).astype(np.uint8)
        found = split(data, itemsize, turned)
        assert [plane.tolist() for plane in found] == slow(data.tobytes(), itemsize, turned)
        assert (join(iter(found), itemsize, count, turned) == data).all()

    check()
