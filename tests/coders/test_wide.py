"""rANS by vectors of states against one state after the other: the same symbols, the same refusals."""

import numpy as np
import pytest
from coder_cases import KINDS, make, reference
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import decode, encode, wide_loops
from tersor.coders.bits import BitReader
from tersor.coders.rans import read_states
from tersor.coders.tables import read_table
from tersor.errors import FormatError

pytestmark = pytest.mark.skipif(not wide_loops.WIDE, reason="no AVX-512 here: there is one way only")


def outcome(stream: bytes, count: int, wide: bool) -> list[int] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_loops, "WIDE", wide)
        try:
            return decode(stream, count).tolist()
        except FormatError as error:
            return str(error)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"one symbol"}))
@pytest.mark.parametrize("count", [65536, 100003])
def test_both_ways_read_alike(kind: str, count: int) -> None:
    symbols = make(kind, count)
    stream = encode(symbols, "rans")
    assert outcome(stream, count, True) == outcome(stream, count, False) == symbols.tolist()


@given(st.binary(min_size=1, max_size=6), st.floats(0, 1), st.integers(-40, 40), st.integers(-9, 9))
def test_damage_is_seen_alike(noise: bytes, where: float, cut: int, more: int) -> None:
    symbols = make("normal 2", 50000)
    stream = bytearray(encode(symbols, "rans"))
    at = int(where * (len(stream) - len(noise)))
    stream[at : at + len(noise)] = noise
    damaged = bytes(stream[:cut] if cut < 0 else stream + bytes(cut))
    count = len(symbols) + more
    assert outcome(damaged, count, True) == outcome(damaged, count, False)


def test_the_vectors_are_used() -> None:
    """All but the last symbols: else the tests above compare one way with itself."""
    symbols = make("normal 2", 1 << 18)
    stream = memoryview(encode(symbols, "rans"))
    source = BitReader(stream, 1)
    table = read_table(source, stream[0] >> 6)
    states, at = read_states(stream, source.byte_end(), 1 << (stream[0] >> 3 & 7))
    assert len(states) == 32
    out = np.zeros(len(symbols), dtype=np.uint8)
    slots = wide_loops.narrowed(table.slots())
    words = np.frombuffer(stream, "<u2", offset=at)
    _, done = wide_loops.rans_decode_wide(words, states.astype(np.uint32), slots, table.bits, out)
    assert done > len(symbols) - 200
    assert (out[:done] == symbols[:done]).all()
    assert reference.decode(bytes(stream), len(symbols)).tolist() == symbols.tolist()
