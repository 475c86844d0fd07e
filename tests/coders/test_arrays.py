"""Arrays in parts: the same bytes as in one part, for parts of any size, without reading more than a part."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.coders import arrays, decode, encode, pieces, static
from tersor.coders.arrays import SymbolQueue, decode_array, decode_slices, encode_array
from tersor.coders.choice import decode_parts
from tersor.coders.pages import LARGE, pages
from tersor.coders.pieces import LARGEST, UNIT, count_units, on_all_cores
from tersor.coders.plan import Output, Plan
from tersor.errors import FormatError

KINDS = [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)]
COUNTS = (0, 1, 7, UNIT - 1, 2 * UNIT, 2 * UNIT + 1, 5 * UNIT + 11, (LARGEST + 2) * UNIT + 5)


def numbers(count: int, itemsize: int) -> np.ndarray:
    """Bytes of `count` elements: noise in the low bytes, normal high bytes that change in the middle."""
    rng = np.random.default_rng(count + itemsize)
    data = rng.integers(0, 256, (count, itemsize)).astype(np.uint8)
    data[:, -1] = np.rint(rng.normal(60, 4, count)).astype(np.int64) % 256
    data[count // 2 :, -1] //= 8
    return data.reshape(-1)


@pytest.mark.sampled
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("itemsize", "turned"), KINDS)
def test_planes_read_in_parts_give_the_same_bytes(
    itemsize: int, turned: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, most = numbers(count, itemsize), 0

    def read(begin: int, end: int) -> np.ndarray:
        nonlocal most
        most = max(most, end - begin)
        return data[begin * itemsize : end * itemsize]

    whole, lengths = encode_array(read, count, itemsize, turned=turned, coder="fast", width=0)
    monkeypatch.setattr(arrays, "LONG", 0)
    monkeypatch.setattr("tersor.coders.bytes.planes.AT_ONCE", 50_000)  # divides none of the counts
    most = 0
    found, again = encode_array(read, count, itemsize, turned=turned, coder="fast", width=0)
    assert (found.tobytes(), again) == (whole.tobytes(), lengths)
    if itemsize > 1:
        assert most <= 50_000
    for step in (1 << 40, max(count // 3, 1), 12_345):
        slices = list(decode_slices(found, lengths, itemsize, count, turned=turned, width=0, step=step))
        assert np.concatenate(slices).tobytes() == data.tobytes()
        assert [len(part) for part in slices[:-1]] == [step * itemsize] * (len(slices) - 1)
    monkeypatch.setattr(arrays, "AT_ONCE", 50_000)
    assert decode_array(found, lengths, itemsize, count, turned=turned, width=0).tobytes() == data.tobytes()


@pytest.mark.parametrize("wrong", ["short", "long", "planes", "flipped"])
def test_damaged_streams_are_refused_in_parts_too(wrong: str) -> None:
    count = 5 * UNIT
    data = numbers(count, 2)
    streams, lengths = encode_array(
        lambda a, b: data[2 * a : 2 * b], count, 2, turned=True, coder="fast", width=0
    )
    if wrong == "flipped":  # the end of a rANS or Huffman stream, or the zeros of its head
        streams = streams.copy()
        streams[lengths[0]] ^= 0x40
    elif wrong == "planes":
        lengths = [*lengths, 0]
    else:
        count += 1 if wrong == "short" else -1
    with pytest.raises(FormatError):
        list(decode_slices(streams, lengths, 2, count, turned=True, width=0, step=1000))
    with pytest.raises(FormatError):
        decode_array(streams, lengths, 2, count, turned=True, width=0)


@pytest.mark.parametrize("itemsize", [1, 2])
def test_decoded_arrays_share_no_memory_with_their_stream(itemsize: int) -> None:
    """Raw bytes are read without a copy, but must not be returned without one."""
    data = np.random.default_rng(0).integers(0, 256, 5000 * itemsize).astype(np.uint8)
    streams, lengths = encode_array(
        lambda a, b: data[itemsize * a : itemsize * b], 5000, itemsize, turned=False, coder="raw", width=0
    )
    how = {"turned": False, "width": 0}
    slices = decode_slices(streams, lengths, itemsize, 5000, step=9999, **how)
    for found in (decode_array(streams, lengths, itemsize, 5000, **how), next(slices)):
        assert (found == data).all()
        assert not np.shares_memory(found, streams)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.integers(0, 99))
def test_symbol_queue_regroups_parts(sizes: list[int], wanted: list[int], seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(0, 256, sum(sizes)).astype(np.uint8)
    parts = SymbolQueue(iter([np.empty(0, np.uint8), *np.split(symbols, np.cumsum(sizes))]))
    at = 0
    for size in wanted:
        if at + size <= len(symbols):
            assert parts.take(size).tolist() == symbols[at : at + size].tolist()
            at += size


@pytest.mark.parametrize("count", [1, 2 * UNIT - 1, 5 * UNIT + 3])
@pytest.mark.parametrize("high", [1, 16, 256])
def test_decode_parts_equals_decode(count: int, high: int) -> None:
    symbols = np.random.default_rng(count).integers(0, high, count).astype(np.uint8)
    symbols[: count // 2] //= 2
    stream = np.frombuffer(encode(symbols, "fast"), np.uint8)
    assert (np.concatenate(list(decode_parts(stream, count))) == symbols).all()
    assert (decode(stream, count) == symbols).all()
    with pytest.raises(FormatError):
        list(decode_parts(stream, 0))


@pytest.mark.parametrize("count", [1, 255, 2 * UNIT - 1, 2 * UNIT, 3 * UNIT + 1, (LARGEST + 1) * UNIT + 9])
def test_count_units_equals_bincount(count: int) -> None:
    symbols = np.random.default_rng(count).integers(0, 250, count).astype(np.uint8)
    counts = count_units(symbols)
    units = [symbols] if count < 2 * UNIT else np.split(symbols, range(UNIT, count, UNIT))
    assert [row.tolist() for row in counts] == [np.bincount(u, minlength=256).tolist() for u in units]


def test_only_a_few_items_are_computed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    found = on_all_cores(work, range(100), pieces.PARALLEL)
    assert [next(found) for _ in range(10)] == [n * n for n in range(10)]
    assert len(begun) <= 10 + 5
    assert list(found) == [n * n for n in range(10, 100)]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=30))), st.integers(0, 100))
def test_output_behaves_like_bytes(inserted: list[tuple[float, bytes]], most: int) -> None:
    out, plain = Output(most), b""
    for place, stream in inserted:
        at = round(place * len(plain))
        out.insert(at, stream)
        plain = plain[:at] + stream + plain[at:]
        out.append(np.frombuffer(stream, np.uint8))
        plain += stream
        assert (len(out), out.tobytes(), out.view().tobytes()) == (len(plain), plain, plain)
    out.truncate(len(plain) // 2)
    assert out.tobytes() == plain[: len(plain) // 2]


@pytest.mark.parametrize("nbytes", [0, 1, LARGE - 1, LARGE, LARGE + 1])
def test_pages_can_be_written(nbytes: int) -> None:
    array = pages(nbytes)
    array[:] = 7
    assert (array.dtype, array.shape, int(array.sum())) == (np.uint8, (nbytes,), 7 * nbytes)


def planned(monkeypatch: pytest.MonkeyPatch, w: np.ndarray) -> tuple[int, int]:
    """(planes that get a table planned, bytes of all streams) of floats with the profile "max"."""
    tables = 0
    plain = static.plan_rans

    def counting(counts: np.ndarray, **options: bool) -> Plan | None:
        nonlocal tables
        tables += 1
        return plain(counts, **options)

    monkeypatch.setattr(static, "plan_rans", counting)
    data = w.view(np.uint8)
    streams, _ = encode_array(
        lambda a, b: data[4 * a : 4 * b], len(w), 4, turned=True, coder="max", width=len(w)
    )
    return tables, len(streams)


@pytest.mark.parametrize("count", [200, 384, 500])
def test_no_table_is_planned_for_the_mantissas_of_few_floats(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    tables, nbytes = planned(monkeypatch, w)
    assert tables == 1  # of the exponents
    assert nbytes < 3.75 * count


def test_pieces_are_not_sought_where_every_unit_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of units have no less entropy than the units, so that the stream is raw however it is cut."""
    drawn = np.random.default_rng(1)
    noise = drawn.integers(0, 256, 5 * pieces.UNIT).astype(np.uint8)
    sparse = np.where(np.arange(len(noise)) < 2 * pieces.UNIT, noise & 3, noise).astype(np.uint8)
    sought = []
    plain = pieces.piece_sizes
    monkeypatch.setattr(pieces, "piece_sizes", lambda *given: sought.append(1) or plain(*given))
    for symbols, finds in ((noise, 0), (sparse, 1)):
        sought.clear()
        stream = encode(symbols, "fast")
        assert len(sought) == finds
        assert (decode(stream, len(symbols)) == symbols).all()
    assert len(encode(noise, "fast")) == 1 + len(noise)


@given(st.lists(st.lists(st.integers(0, 1 << 20), min_size=3, max_size=3), min_size=1, max_size=5))
def test_entropies_of_several_histograms(rows: list[list[int]]) -> None:
    found = static.orders0(np.array(rows))
    for row, bits in zip(rows, found, strict=True):
        expected = sum(n * math.log2(sum(row) / n) for n in row if n)
        assert bits == pytest.approx(expected, rel=1e-9, abs=1e-6)
