"""The matrix coders: round trips with all options, the second decoder, and errors."""

import numpy as np
import pytest
from coder_cases import predictive_reference, reference
from hypothesis import given, settings
from matrix_cases import LONG, SHAPES, TALL, WIDE, Case, cases, mixing_streams, predictive_streams

from tersor.coders import choice, coder_of, decode, encode
from tersor.coders.mixing import mixing, mixing_loops
from tersor.coders.mixing.logistic import STRETCH_MAX, adaptation_rates, logistic_tables
from tersor.coders.mixing.mixing import SAMPLE, rows_from
from tersor.coders.predictive import regression_loops
from tersor.coders.predictive.matrix_model import BLOCK, EIGHTHS
from tersor.errors import FormatError, SettingError


def returns(case: Case, stream: bytes, also_slow: bool = True) -> None:
    count = len(case.symbols)
    assert (decode(stream, count, width=case.width, keep=case.keep) == case.symbols).all()
    if also_slow:
        assert (reference.decode(stream, count, case.width, case.keep) == case.symbols).all()


@settings(max_examples=60)
@given(mixing_streams())
def test_mixing_round_trips(made: tuple[Case, bytes]) -> None:
    returns(*made, also_slow=len(made[0].symbols) < 300)


@settings(max_examples=6)
@given(mixing_streams(TALL))
def test_mixing_with_more_rows_than_the_history(made: tuple[Case, bytes]) -> None:
    returns(*made)


@settings(max_examples=30)
@given(predictive_streams(SHAPES[5:] + LONG))
def test_predictive_round_trips(made: tuple[Case, bytes]) -> None:
    returns(*made, also_slow=len(made[0].symbols) < 2000)


@settings(max_examples=4)
@given(predictive_streams(WIDE))
def test_predictive_in_bands(made: tuple[Case, bytes]) -> None:
    returns(*made, also_slow=False)


@settings(max_examples=60)
@given(cases(SHAPES + LONG))
def test_max_is_never_longer_than_fast(case: Case) -> None:
    stream = encode(case.symbols, "max", width=case.width, keep=case.keep)
    assert stream == encode(case.symbols, "max", width=case.width, keep=case.keep)
    assert len(stream) <= len(encode(case.symbols))
    returns(case, stream, also_slow=False)


def test_a_long_run_of_zeros_at_the_start() -> None:
    """The probability of an unseen symbol goes to zero, and is never a divisor."""
    symbols = np.zeros(200_000, dtype=np.uint8)
    symbols[150_000::97] = 1
    for width in (1000, 0):
        stream = encode(symbols, "mixing", width=width)
        assert (decode(stream, len(symbols), width=width) == symbols).all()


def test_a_sample_without_kept_elements() -> None:
    keep = np.zeros((1100, 1024), dtype=bool)
    keep[-550:] = np.random.default_rng(0).random((550, 1024)) < 0.6
    symbols = np.random.default_rng(1).integers(0, 3, int(keep.sum())).astype(np.uint8)
    assert len(symbols) > SAMPLE
    stream = encode(symbols, "mixing", width=1024, keep=keep)
    assert (decode(stream, len(symbols), width=1024, keep=keep) == symbols).all()


def test_an_encoder_with_a_short_buffer_returns_the_size_it_needs() -> None:
    matrix = np.random.default_rng(0).integers(-128, 128, (40, 50)).astype(np.int8)
    none = np.zeros((0, 0), dtype=np.uint8)
    room, short = np.zeros(9000, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    used = [
        mixing_loops.mix(
            matrix, none, data, 0, 0, True, True, False, *logistic_tables(), *adaptation_rates(2)
        )
        for data in (room, short)
    ]
    assert used[0] == used[1] > 2000
    assert (room[:100] == short).all()


def test_a_damaged_stream_ends_soon() -> None:
    """At the end of its data, a decoder must stop, whatever the count is."""
    stream = encode(np.random.default_rng(0).integers(0, 7, 500).astype(np.uint8), "mixing", width=10)
    with pytest.raises(FormatError, match="damaged"):
        decode(stream, 50_000_000, width=10)


def test_logistic_tables_equal_the_formula() -> None:
    squash, stretch = logistic_tables()
    odds = np.arange(-STRETCH_MAX, STRETCH_MAX + 1) / 256
    assert abs(squash - 65536 / (1 + np.exp(-odds))).max() < 1
    middle, place = 16 * np.arange(4096) + 8, stretch + STRETCH_MAX
    assert (squash[place] >= middle).all()
    assert (squash[place - 1] < middle).all()
    assert (squash + squash[::-1] >= 65535).all()
    assert np.abs(np.array(EIGHTHS) - 2.0 ** (np.arange(8) / 8 + 30)).max() <= 0.5


def test_moments_are_exact_beyond_32_bits() -> None:
    side = regression_loops.rounded(20)
    pairs, total = np.zeros((BLOCK // 2, side, 2), dtype=np.int16), np.zeros((side, side))
    pairs[:, 0], pairs[:, 1], pairs[:, 2:21] = 256, -4096, 4095
    for _ in range(40):
        regression_loops.add_moments(pairs, total)
    one = pairs.transpose(1, 0, 2).reshape(side, BLOCK).astype(np.int64)
    assert (np.tril(total) == 40 * np.tril(one @ one.T)).all()
    assert abs(total).max() > 1 << 32


def test_regression_equals_a_plain_elimination() -> None:
    """Bit for bit equal to numpy in the reference, for widths that fill panels and vectors or do not."""
    rng = np.random.default_rng(0)
    for width in (1, 2, 7, 8, 9, 16, 31, 100, 256):
        z = rng.normal(size=(2 * BLOCK, width)) @ rng.normal(size=(width, width)) * 200 / width**0.5
        one = np.hstack([np.full((2 * BLOCK, 1), 256), np.rint(z).clip(-4096, 4096)])
        total = np.zeros((regression_loops.rounded(width),) * 2)
        total[: width + 1, : width + 1] = one.T @ one
        found = regression_loops.learn(total, width, 2 * BLOCK, 4.0)
        expected = predictive_reference.learn(one.T @ one, 2 * BLOCK, 4.0)
        assert (found[: width + 1, : width + 1] == np.tril(expected, -1)).all()
        assert not np.triu(found).any()


@pytest.mark.parametrize(
    ("width", "keep", "says"),
    [
        (7, None, "width=7, but it must divide the 100 elements"),
        (-5, None, "width=-5"),
        (10, np.ones((10, 11), dtype=bool), "keeps 110 of 110 elements, but it must be bool and keep 100"),
        (10, np.ones((10, 10), dtype=np.uint8), "mask of dtype uint8"),
        (3, np.arange(200) < 100, "must divide the 200"),
    ],
)
def test_inconsistent_matrices_are_refused(width: int, keep: np.ndarray | None, says: str) -> None:
    symbols = np.random.default_rng(0).integers(0, 9, 100).astype(np.uint8)
    with pytest.raises(SettingError, match=says):
        encode(symbols, "mixing", width=width, keep=keep)
    stream = encode(symbols, "mixing", width=10)
    with pytest.raises(FormatError, match=says):
        decode(stream, 100, width=width, keep=keep)


def test_predictive_refuses_small_matrices() -> None:
    symbols = np.random.default_rng(0).normal(0, 9, 100).astype(np.int8).view(np.uint8)
    for width in (0, 1, 10, 100):
        with pytest.raises(SettingError, match="Use coder='max'"):
            encode(symbols, "predictive", width=width)


def test_coder_of_matrix_coders() -> None:
    symbols = np.rint(np.random.default_rng(0).normal(0, 20, 8192)).astype(np.int8).view(np.uint8)
    for name in ("predictive", "mixing"):
        assert coder_of(encode(symbols, name, width=64)) == name


def test_pieces_follow_changes_of_the_statistics() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, 3, 70_000), rng.normal(60, 20, 70_000), np.full(40_000, 7.0), rng.normal(0, 3, 9)]
    symbols = np.rint(np.concatenate(parts)).clip(-128, 127).astype(np.int8).view(np.uint8)
    stream = encode(symbols, "pieces")
    assert len(stream) < 0.9 * len(encode(symbols, "rans"))
    assert (decode(stream, len(symbols)) == symbols).all()
    assert (reference.decode(stream, len(symbols)) == symbols).all()
    for count in (len(symbols) - 40_000, len(symbols) + 1, 2 * len(symbols)):
        with pytest.raises(FormatError):
            decode(stream, count)
    for length in (1, 2, 5, 9, 100, len(stream) // 2, len(stream) - 1):
        with pytest.raises(reference.BadStream):
            reference.decode(stream[:length], len(symbols))
        with pytest.raises(FormatError):
            decode(stream[:length], len(symbols))


@pytest.mark.parametrize("masked", [False, True])
def test_dense_codes_are_not_mixed_for_their_first_rows_alone(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixing takes 1 us a code. Here it suits the first rows alone, as special tokens of an embedding."""
    drawn = np.random.default_rng(5)
    codes = np.rint(drawn.normal(8, 2.5, (400, 384))).clip(0, 15).astype(np.uint8)
    codes[:90] = codes[np.arange(90) % 3]
    keep = drawn.random(codes.shape) < 0.9 if masked else None
    symbols = codes.reshape(-1) if keep is None else codes[keep]
    tried, sampled = [], []
    plan, mix = choice.MATRIX_CODERS["mixing"], mixing.write
    monkeypatch.setitem(
        choice.MATRIX_CODERS,
        "mixing",
        plan._replace(plan=lambda *given: tried.append(1) or plan.plan(*given)),
    )
    monkeypatch.setattr(mixing, "write", lambda *given: sampled.append(len(given[0])) or mix(*given))
    stream = encode(symbols, "max", width=384, keep=keep)
    assert not tried
    assert len(sampled) == 2
    assert max(sampled) < choice.MIXING_COUNT + 384  # whole rows
    assert (decode(stream, len(symbols), width=384, keep=keep) == symbols).all()


@pytest.mark.sampled(scale=0.2, ordered=slice(200, 400))
@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize(
    "ordered", [slice(0, 200), slice(200, 400), slice(130, 270), slice(80, 400)], ids=str
)
def test_an_order_that_some_rows_have_shortens_the_file(ordered: slice, scale: float) -> None:
    drawn = np.random.default_rng(5)
    rows = drawn.normal(0, 1, (400, 256))
    rows[: ordered.start or 0] *= scale  # what pieces gain by a table for these rows is no gain elsewhere
    for at in range(*ordered.indices(400)):
        rows[at] = 0.9 * rows[at - 1] + 0.19**0.5 * rows[at] if at else rows[at]
    symbols = np.rint(2 * rows).clip(-8, 7).astype(np.int8).view(np.uint8).reshape(-1)
    least = min(len(encode(symbols, word, width=256)) for word in ("mixing", "rans"))
    assert len(encode(symbols, "max", width=256)) <= least


def test_rows_of_a_matrix_from_a_quarter_on() -> None:
    codes = np.arange(15, dtype=np.uint8)
    keep = np.arange(15).reshape(5, 3) % 2 == 0
    assert rows_from(codes, 3, None, 2)[0].tolist() == list(range(6, 15))
    values, width, kept = rows_from(codes[keep.reshape(-1)], 3, keep, 2)
    assert (values.tolist(), width) == ([6, 8, 10, 12, 14], 3)
    assert kept is not None
    assert kept.tolist() == keep.reshape(-1)[6:].tolist()
    assert len(rows_from(codes, 15, None, 3)[0]) == 15  # one row has no halves
