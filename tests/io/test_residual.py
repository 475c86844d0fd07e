"""Residuals: arrays round-trip bit for bit against any base."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.dtypes import CODES
from tersor.errors import FormatError
from tersor.io.patch import residual
from tersor.io.patch.residual import fitted, groups, ordered, rebuild, residual_streams, unordered
from tersor.io.patch.uniform_grids import UniformGrid, regrid

SHAPES = ((), (0,), (1,), (7,), (0, 3), (3, 0), (5, 3), (2, 3, 4), (64, 33), (9, 1))
SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38)


def bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def drawn(dtype: torch.dtype, shape: tuple[int, ...], rng: np.random.Generator, spread: float) -> Tensor:
    """Values of any kind, including NaN and both zeros for floats."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:
        return torch.from_numpy(np.asarray(rng.random(shape) < spread))
    if dtype.is_floating_point and dtype.itemsize > 1:
        values = torch.from_numpy(np.asarray(rng.normal(0, spread, shape)))
        for value in SPECIAL:
            values[torch.from_numpy(np.asarray(rng.random(shape) < 0.02))] = value
        return values.to(dtype)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(rng.integers(0, 256, count, np.uint8)).view(dtype).reshape(shape)


def moved(old: Tensor, rng: np.random.Generator) -> Tensor:
    """The array some steps of training later: a fraction of its bytes changed."""
    if not old.numel():
        return old
    raw = old.reshape(-1).view(torch.uint8).numpy().copy()
    if old.dtype is torch.bool:
        return torch.from_numpy(raw ^ (rng.random(len(raw)) < 0.1)).bool().reshape(old.shape)
    some = rng.random(len(raw)) < 0.2
    raw[some] += rng.integers(0, 3, int(some.sum()), np.uint8)
    return torch.from_numpy(raw).view(old.dtype).reshape(old.shape)


def round_trip(new: Tensor, base: Tensor | None, keep: Tensor | None = None, profile: str = "max") -> int:
    """Code and rebuild. Returns the number of bytes."""
    streams = list(residual_streams(new, base, keep, profile))
    again = rebuild(iter(streams), base, new.dtype, tuple(new.shape), keep)
    expected = np.frombuffer(bits(new), np.uint8).reshape(-1, new.dtype.itemsize).copy()
    if keep is not None:
        expected[~keep.reshape(-1).numpy()] = 0
    assert (again.dtype, again.shape) == (new.dtype, new.shape)
    assert bits(again) == expected.tobytes()
    return sum(map(len, streams))


@given(
    st.sampled_from(list(CODES)),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32),
    st.sampled_from((None, 0.0, 0.3, 1.0)),
)
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...], seed: int, share: float | None) -> None:
    rng = np.random.default_rng(seed)
    old = drawn(dtype, shape, rng, 0.5)
    keep = None if share is None else torch.from_numpy(np.asarray(rng.random(shape) < share))
    for new in (moved(old, rng), drawn(dtype, shape, rng, 0.5)):
        round_trip(new, old, keep, "fast")
        round_trip(new, None, keep, "fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int16])
def test_more_than_a_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "PIECE", 1000)
    monkeypatch.setattr(residual, "LEAST", 100)
    rng = np.random.default_rng(0)
    old = drawn(dtype, (3501,), rng, 0.1)
    keep = torch.from_numpy(rng.random(3501) < 0.7)
    new = moved(old, rng)
    round_trip(new, old)
    round_trip(new, old, keep)
    round_trip(new, None)
    assert (
        len(list(residual_streams(new, old))) > (4 if dtype.is_floating_point else 3) * dtype.itemsize
    )  # pieces and groups


@given(st.sampled_from(list(residual.MANTISSA)), st.integers(0, 2**32))
def test_words_have_the_order_of_values(dtype: torch.dtype, seed: int) -> None:
    values = drawn(dtype, (50,), np.random.default_rng(seed), 1.0)
    words = values[~values.isnan()].view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
    assert np.array_equal(unordered(ordered(words, True), True), words)
    real = values[~values.isnan()].double().numpy()
    sorted_ = real[np.argsort(ordered(words, True), kind="stable")]
    assert (sorted_[1:] >= sorted_[:-1]).all()


def test_groups_are_of_one_exponent_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "LEAST", 10)
    values = np.array([1.0, 2.0, 4.0] * 20 + [8.0] * 3, dtype=np.float32)
    found = groups(values.view(np.uint32), torch.float32)
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(63))
    assert [sorted(set(values[group].tolist())) for group in found] == [[1.0], [2.0], [4.0, 8.0]]


def test_a_training_step_costs_less_than_the_weights() -> None:
    """Steps of a thousandth of the weights change about ten bits of each."""
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(300, 200, generator=rng)
    new = old + 1e-3 * torch.randn(300, 200, generator=rng)
    assert round_trip(new, old) < 0.62 * new.nbytes
    assert round_trip(new.bfloat16(), old.bfloat16()) < 0.27 * new.bfloat16().nbytes


def test_pruned_weights_that_stay_zero_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(-7, 8, 40_000).astype(np.int8)
    old[rng.random(40_000) < 0.9] = 0
    new = old.copy()
    some = (old != 0) & (rng.random(40_000) < 0.1)
    new[some] += 1
    count, changed = int((old != 0).sum()), int(some.sum())
    bound = count * math.log2(count) - changed * math.log2(changed)
    bound -= (count - changed) * math.log2(count - changed)  # log2 of the ways to choose them, about
    assert (
        round_trip(torch.from_numpy(new).reshape(200, 200), torch.from_numpy(old).reshape(200, 200))
        < bound / 8 + 60
    )


@pytest.mark.parametrize(
    ("shape", "overlap"), [((3, 5), (3, 4)), ((2, 2), (2, 2)), ((6, 4), (5, 4)), ((5, 0), (5, 0))]
)
def test_fitted(shape: tuple[int, int], overlap: tuple[int, int]) -> None:
    old = torch.arange(1.0, 21).reshape(5, 4)
    found: Any = fitted(old, shape, torch.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            inside = row < overlap[0] and column < overlap[1]
            assert found[row, column] == (old[row, column] if inside else 0)


def test_arrays_with_other_axes_or_dtypes_do_not_fit() -> None:
    assert fitted(torch.zeros(3), (3, 1), torch.float32) is None
    assert fitted(torch.zeros(3), (3,), torch.int32) is None
    assert fitted(torch.zeros(3).half(), (3,), torch.float32) is not None


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_regrid_against_a_slow_loop(group: int, zeros: bool, axis: int) -> None:
    rng = np.random.default_rng(1)
    rows, inputs = (4, 5) if axis == 0 else (5, 4)
    columns = -(-inputs // group) if group else 1

    def grid() -> UniformGrid:
        scale = torch.from_numpy(rng.uniform(0.1, 1, (rows, columns))).float()
        zero = torch.from_numpy(rng.integers(-5, 6, (rows, columns))).short() if zeros else None
        return UniformGrid(scale, zero, group, axis)

    old, new = grid(), grid()
    codes = torch.from_numpy(rng.integers(-128, 128, (4, 5)).astype(np.int8))
    found = regrid(codes, old, new)
    for i in range(4):
        for j in range(5):
            row, column = (i, j) if axis == 0 else (j, i)
            at = (row, column // group if group else 0)
            value = (int(codes[i, j]) - (int(old.zero[at]) if zeros else 0)) * float(old.scale[at])
            value = round(value / float(new.scale[at]) + (int(new.zero[at]) if zeros else 0))
            assert found[i, j] == max(-128, min(127, value))


def test_grids_that_do_not_fit() -> None:
    scale = torch.ones(4, 1)
    assert UniformGrid(scale, None, 0, 0).fits((4, 5))
    assert not UniformGrid(scale, None, 0, 1).fits((4, 5))
    assert not UniformGrid(scale, None, 0, 2).fits((4, 5))
    assert not UniformGrid(scale, torch.ones(4, 2), 0, 0).fits((4, 5))
    assert not UniformGrid(torch.ones(4, 2), None, 2, 0).fits((4, 5))
    assert UniformGrid(torch.ones(4, 3), None, 2, 0).fits((4, 5))
    assert not UniformGrid(torch.ones(4), None, 0, 0).fits((4,))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32, torch.int64])
def test_damaged_streams_are_refused(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    old = drawn(dtype, (40, 30), rng, 0.5)
    streams = list(residual_streams(moved(old, rng), old))
    with pytest.raises(FormatError, match="fewer streams"):
        rebuild(iter(streams[:-1]), old, dtype, (40, 30))
    for _ in range(200):
        bad, which = list(streams), int(rng.integers(len(streams)))
        data = bytearray(bad[which])
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        bad[which] = bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            rebuild(iter(bad), old, dtype, (40, 30))
        except FormatError:
            continue
