"""rANS with vectors of states against one state after the other: the same symbols, the same errors.

Uses the vectors of this processor; `make test-cpus` runs this file with those of other processors too.
"""

import platform
import re

import numpy as np
import pytest
from coder_cases import KINDS, make, reference
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, types

from tersor.coders import decode, encode
from tersor.coders.loops import INT, U16, U32_OUT, U64
from tersor.coders.rans import cpu_loops, wide_loops
from tersor.errors import FormatError

I32, I32_OUT = types.Array(types.int32, 1, "C", readonly=True), types.int32[::1]


def outcome(stream: bytes, count: int, wide: bool, width: int = 0) -> list[int] | str:
    with pytest.MonkeyPatch.context() as patch:
        if not wide:
            patch.setattr(wide_loops, "LANES", 64)  # more than the states of any stream
        try:
            return decode(stream, count, width=width).tolist()
        except FormatError as error:
            return str(error)


PROCESSORS = [
    ("skylake-avx512", "", "AVX-512"),
    ("znver4", "", "AVX-512"),
    ("haswell", "+avx512f", "AVX-512"),
    ("skylake-avx512", "-avx512f", "AVX2"),
    ("znver4", "-avx512f,+avx2", "AVX2"),
    ("haswell", "", "AVX2"),
    ("generic", "+avx2", "AVX2"),
    ("haswell", "-avx2", "any"),
    ("haswell", "+avx2,-avx", "any"),
    ("sandybridge", "", "any"),  # AVX: its 256-bit vectors are only for floats
    ("generic", "", "any"),
    ("", "", "any"),
]


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="LLVM may not know x86 here")
@pytest.mark.parametrize(("cpu", "features", "variant"), PROCESSORS)
def test_the_variant_follows_from_the_code_of_llvm(cpu: str, features: str, variant: str) -> None:
    assert cpu_loops.variant_of("x86_64-unknown-linux-gnu", cpu, features) == variant


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin", "riscv64-linux-gnu"])
def test_other_architectures_use_no_x86_instructions(triple: str) -> None:
    assert cpu_loops.variant_of(triple, "", "+avx512f,+avx2") == "any"


def test_only_intrinsics_of_this_processor_are_used() -> None:
    @njit(INT(U16, INT, U32_OUT, I32, U64, I32, I32_OUT, INT))
    def once(words, at, states, tables, slots, kinds, out, place):  # noqa: PLR0917
        return wide_loops.decode16_tables(words, at, states, tables, slots, kinds, out, place)

    (text,) = once.inspect_llvm().values()
    found = set(
        re.findall(r"@llvm\.x86\.((?!atomic)\w+)", text)
    )  # numba uses atomic ones to count references
    assert found == {"AVX-512": {"avx512"}, "AVX2": {"avx2"}, "any": set()}[cpu_loops.VARIANT]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"one symbol"}))
@pytest.mark.parametrize("count", [65536, 100003])
def test_both_decoders_give_the_same_symbols(kind: str, count: int) -> None:
    symbols = make(kind, count)
    stream = encode(symbols, "rans")
    assert outcome(stream, count, True) == outcome(stream, count, False) == symbols.tolist()


@given(st.binary(min_size=1, max_size=6), st.floats(0, 1), st.integers(-40, 40), st.integers(-9, 9))
def test_both_decoders_give_the_same_errors(noise: bytes, where: float, cut: int, more: int) -> None:
    symbols = make("normal 2", 50000)
    stream = bytearray(encode(symbols, "rans"))
    at = int(where * (len(stream) - len(noise)))
    stream[at : at + len(noise)] = noise
    damaged = bytes(stream[:cut] if cut < 0 else stream + bytes(cut))
    count = len(symbols) + more
    assert outcome(damaged, count, True) == outcome(damaged, count, False)


def test_the_vectors_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare one decoder with itself."""
    seen = []
    once = wide_loops.rans_decode_wide
    monkeypatch.setattr(wide_loops, "rans_decode_wide", lambda *args: seen.append(args) or once(*args))
    for count, states in ((1 << 18, 32), (50000, 16)):
        symbols = make("normal 2", count)
        stream = encode(symbols, "rans")
        assert decode(stream, count).tolist() == symbols.tolist() == reference.decode(stream, count).tolist()
        assert len(seen.pop()[1]) == states


@pytest.mark.parametrize("shape", [(300, 40), (129, 300), (64, 64), (2, 2100), (1000, 7), (87, 513)])
def test_both_decoders_give_the_same_predicted_codes(shape: tuple[int, int]) -> None:
    """Numbers of rows that fill vectors and blocks, and that leave the states rotated."""
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
