"""rANS by vectors of states against one state after the other: the same symbols, the same refusals."""

import numpy as np
import pytest
from coder_cases import KINDS, make, reference
from hypothesis import given
from hypothesis import strategies as st

from tersor.coders import decode, encode, wide_loops
from tersor.errors import FormatError

pytestmark = pytest.mark.skipif(not wide_loops.WIDE, reason="no AVX-512 here: there is one way only")


def outcome(stream: bytes, count: int, wide: bool, width: int = 0) -> list[int] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_loops, "WIDE", wide)
        try:
            return decode(stream, count, width=width).tolist()
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


def test_the_vectors_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above compare one way with itself."""
    seen = []
    once = wide_loops.rans_decode_wide
    monkeypatch.setattr(wide_loops, "rans_decode_wide", lambda *given: seen.append(given) or once(*given))
    for count, states in ((1 << 18, 32), (50000, 16)):
        symbols = make("normal 2", count)
        stream = encode(symbols, "rans")
        assert decode(stream, count).tolist() == symbols.tolist() == reference.decode(stream, count).tolist()
        assert len(seen.pop()[1]) == states


@pytest.mark.parametrize("shape", [(300, 40), (129, 300), (64, 64), (2, 2100), (1000, 7), (87, 513)])
def test_both_ways_read_predicted_codes_alike(shape: tuple[int, int]) -> None:
    """Rows that fill vectors and blocks, and that leave the states turned."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(shape[0], 5)) @ rng.normal(size=(5, shape[1])) * 6
    codes = np.rint(factors + rng.normal(size=shape) * 4).clip(-128, 127).astype(np.int8)
    symbols = codes.view(np.uint8).ravel()
    stream = encode(symbols, "predictive", width=shape[1])
    expected = symbols.tolist()
    assert outcome(stream, codes.size, True, shape[1]) == expected
    assert outcome(stream, codes.size, False, shape[1]) == expected
    for at in rng.integers(0, len(stream), 12):
        damaged = bytes([*stream[:at], stream[at] ^ 1 << int(rng.integers(8)), *stream[at + 1 :]])
        for count in (codes.size, codes.size - shape[1]):
            assert outcome(damaged, count, True, shape[1]) == outcome(damaged, count, False, shape[1])
