"""Value histograms against numpy on all values at once, in any order, with any split into batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths.value_histogram import NARROWEST, ValueHistogram

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
floats64 = st.floats(allow_nan=False, allow_infinity=False)
batches32 = st.lists(st.lists(st.one_of(floats32, st.floats(-8, 8, width=32)), max_size=12), max_size=6)
batches64 = st.lists(st.lists(floats64, max_size=12), max_size=6)


def histogram_of(batches: list[torch.Tensor], bins: int = 2048) -> ValueHistogram:
    histogram = ValueHistogram(bins)
    for batch in batches:
        histogram.add(batch)
    return histogram


def check_against_numpy(batches: list[list[float]], bins: int, dtype: torch.dtype) -> None:
    tensors = [torch.tensor(batch, dtype=dtype) for batch in batches]
    found = histogram_of(tensors, bins)
    values = torch.cat([torch.zeros(0, dtype=dtype), *tensors]).double().numpy()
    once = histogram_of([torch.from_numpy(values).to(dtype)], bins)
    assert torch.equal(found.counts, once.counts)
    assert (found.first, found.exponent, found.count) == (once.first, once.exponent, once.count)
    assert (found.least, found.greatest) == (min(values, default=math.inf), max(values, default=-math.inf))
    assert found.count == len(values)
    assert found.zeros == int((values == 0).sum())
    # Python's integers, exact for every float64.
    counts: dict[int, int] = {}
    for value in values[values != 0]:
        k = math.floor(math.ldexp(value, -found.exponent)) - found.first
        if value < 0:
            k = min(k, -1 - found.first)  # ldexp of a tiny value is -0.0
        counts[k] = counts.get(k, 0) + 1
    assert all(0 <= k < bins for k in counts)
    assert {k: int(n) for k, n in enumerate(found.counts) if n} == counts
    if values.any() and found.exponent > NARROWEST:  # bins of half the width would not hold all
        span = [math.floor(math.ldexp(end, 1 - found.exponent)) for end in (found.low, found.high)]
        assert span[1] - span[0] >= bins


@settings(max_examples=200, deadline=None)
@given(batches32, st.sampled_from([2, 3, 16, 2048]))
def test_batches_give_the_bins_of_all_values_at_once(batches: list[list[float]], bins: int) -> None:
    check_against_numpy(batches, bins, torch.float32)


@settings(max_examples=100, deadline=None)
@given(batches64)
def test_double_precision(batches: list[list[float]]) -> None:
    check_against_numpy(batches, 16, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_counts_are_those_of_numpy(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 50, 150, generator=torch.Generator().manual_seed(0)) * 3).relu_().sub_(0.5).to(dtype)
    x[:, 3] = 0
    found = histogram_of([*x.split(7)])
    values = x.double().flatten().numpy()
    want, _ = np.histogram(values, found.edges.numpy())
    want[-found.first] -= (values == 0).sum()
    assert np.array_equal(found.counts.numpy(), want)
    assert found.zeros == (values == 0).sum() >= 40 * 150
    assert 0.0 in found.edges.tolist()


def test_memory_does_not_grow() -> None:
    histogram, sizes = ValueHistogram(), set()
    for seed in range(12):
        histogram.add(torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 4.0**seed)
        arrays = [value for value in vars(histogram).values() if isinstance(value, torch.Tensor)]
        sizes.add(sum(array.untyped_storage().nbytes() for array in arrays))
    assert sizes == {2048 * 8}
    assert histogram.count == int(histogram.counts.sum()) == 12_000


def test_views_and_known_ends() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    a, b = histogram_of([x.t()[::2]]), ValueHistogram()
    part = x[:, ::2]
    b.add(part, (float(part.min()), float(part.max())))
    assert torch.equal(a.counts, b.counts)
    assert int(a.counts.sum()) == 24


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_bin_are_refused(bad: float) -> None:
    histogram = ValueHistogram()
    with pytest.raises(SettingError, match="NaN or infinity"):
        histogram.add(torch.tensor([1.0, bad]))
    assert histogram.count == 0
    with pytest.raises(SettingError, match="bins=1, but"):
        ValueHistogram(1)
