"""Symbols that change between counting and coding: refused, without writing beyond an array."""

import numpy as np
import pytest

from tersor.coders.arrays import LONG, encode_array
from tersor.coders.bytes import huffman_loops
from tersor.coders.bytes.planes import join
from tersor.errors import FormatError, StorageError

COUNT = LONG + 100  # long enough that a plane is not held in memory


@pytest.mark.parametrize("coder", ["huffman", "rans", "fast", "max"])
@pytest.mark.parametrize("later", ["rarest", "new"])
def test_a_file_that_changes_meanwhile_is_refused(coder: str, later: str) -> None:
    counted = np.minimum(np.random.default_rng(0).geometric(0.7, COUNT), 200).astype(np.uint8)
    coded = np.full(COUNT, counted.max() if later == "rarest" else 250, dtype=np.uint8)
    asked = 0

    def read(begin: int, end: int) -> np.ndarray:
        nonlocal asked
        asked += end - begin
        return (counted if asked <= COUNT else coded)[begin:end]

    if coder == "rans" and later == "rarest":  # not detected: the stream is only longer than planned
        assert len(encode_array(read, COUNT, 1, turned=False, coder=coder, width=0)[0]) > COUNT
        return
    with pytest.raises(StorageError, match="changed while they were coded"):
        encode_array(read, COUNT, 1, turned=False, coder=coder, width=0)


def test_codes_beyond_the_buffer_are_counted_but_not_written() -> None:
    words = np.zeros(8, dtype=np.uint32)
    symbols, lengths = np.zeros(1000, dtype=np.uint8), np.full(256, 15, dtype=np.uint8)
    used = huffman_loops.huffman_encode(symbols, np.full(256, 0x7FFF, np.uint32), lengths, 0, 0, words[:2])
    assert used == 15000
    assert words.tolist() == [0xFFFFFFFF] * 2 + [0] * 6


def test_planes_of_a_wrong_length_are_refused() -> None:
    planes, out = [np.zeros(4, dtype=np.uint8)] * 2, np.zeros(10, dtype=np.uint8)
    with pytest.raises(FormatError, match="planes of"):
        join(planes, 2, out, turned=True)
