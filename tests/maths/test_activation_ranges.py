"""Activation ranges against numpy's quantile, a brute-force search over all values, and scipy's entropy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from tersor.errors import SettingError
from tersor.maths.activation_ranges import (
    Range,
    entropy_ends,
    minmax_ends,
    mse_ends,
    percentile_ends,
    squared_error,
)
from tersor.maths.ranges import STRIDE
from tersor.maths.value_histogram import ValueHistogram
from tersor.model.observe import grid_of

N = 60_000
KINDS = ["normal", "relu", "silu", "tail", "relu tail", "negative", "shifted", "relu6"]


def values_of(kind: str, seed: int = 0, size: int = N) -> torch.Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    heavy = x.abs().pow(2.5) * x.sign()
    return {
        "normal": x,
        "relu": x.relu(),
        "silu": torch.nn.functional.silu(2 * x),
        "tail": heavy,
        "relu tail": heavy.relu(),
        "negative": -x.abs() - 0.1,
        "shifted": x + 5,
        "relu6": (4 * x).clamp(0, 6),
    }[kind]


def histogram_of(x: torch.Tensor) -> ValueHistogram:
    histogram = ValueHistogram()
    histogram.add(x)
    return histogram


def ends_of(found: Range) -> tuple[float, float]:
    assert all(end.dtype == torch.float64 and end.shape == (1,) for end in found)
    return float(found[0]), float(found[1])


def slow_error(x: np.ndarray, low: float, high: float, bits: int) -> float:
    """The mean squared error on the grid that an edge really gets."""
    grid = grid_of((torch.tensor([low]).double(), torch.tensor([high]).double()), bits=bits)
    scale, zero = float(grid.scale.decode()), int(grid.zero.decode())
    codes = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    return float(np.mean((x - (codes - zero) * scale) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_exact(kind: str) -> None:
    x = values_of(kind)
    assert ends_of(minmax_ends(histogram_of(x))) == (min(float(x.min()), 0), max(float(x.max()), 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [80.0, 99.0, 99.9, 99.99])
def test_percentiles_are_numpys_within_a_bin(kind: str, percentile: float) -> None:
    x = values_of(kind).double().numpy()
    histogram = histogram_of(torch.from_numpy(x))
    low, high = ends_of(percentile_ends(histogram, percentile))
    part = 1 - percentile / 100
    both = x.min() < 0 < x.max()
    down, up = (part / 2, part / 2) if both else (part, 0) if x.min() < 0 else (0, part)
    if both and (x < 0).mean() < down:
        pytest.skip("an end with fewer values than half: tested below")
    for got, share, on in ((low, down, x.min() < 0), (high, 1 - up, x.max() > 0)):
        if not on:
            assert got == 0
            continue
        near = [np.quantile(x, share, method=word) for word in ("lower", "higher")]
        assert near[0] - histogram.width <= got <= near[1] + histogram.width
    outside = ((x < low) | (x > high)).mean()
    in_two_bins = 2 * int(histogram.counts.max()) / N
    assert abs(outside - part) <= in_two_bins
    assert ends_of(percentile_ends(histogram, 100)) == ends_of(minmax_ends(histogram))


def test_an_end_with_few_values_leaves_the_rest_to_the_other() -> None:
    x = torch.cat([torch.linspace(0.001, 1, 997), torch.tensor([-5.0, -6.0, -7.0])])
    low, high = ends_of(percentile_ends(histogram_of(x), 99))  # 10 values: 3 below, 7 above
    assert low == 0
    assert abs(high - float(x[989])) < 0.005


def test_a_range_of_zeros_alone_is_not_chosen() -> None:
    x = torch.zeros(100_000)
    x[:3] = 2.0
    assert ends_of(percentile_ends(histogram_of(x), 99.9)) == (0, 2)
    for bad in (50, 0.999, 101):
        with pytest.raises(SettingError, match="50 < percentile <= 100"):
            percentile_ends(histogram_of(x), bad)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_as_good_as_brute_force_over_all_values(kind: str, bits: int) -> None:
    x = values_of(kind, size=4000)
    histogram = histogram_of(x)
    low, high = ends_of(mse_ends(histogram, bits))
    full = ends_of(minmax_ends(histogram))
    factors = np.geomspace(1 / 32, 1, 28)
    values = x.double().numpy()
    best = min(
        slow_error(values, a, b, bits)
        for a in (full[0] * factors if full[0] else [0.0])
        for b in (full[1] * factors if full[1] else [0.0])
    )
    assert slow_error(values, low, high, bits) <= best * 1.03
    assert full[0] <= low <= 0 <= high <= full[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 8, 12])
def test_the_expected_error_is_that_of_all_values(kind: str, bits: int) -> None:
    x = values_of(kind)
    histogram = histogram_of(x)
    for shrink in (1.0, 0.7, 0.2):
        low, high = (end * shrink for end in minmax_ends(histogram))
        want = slow_error(x.double().numpy(), float(low), float(high), bits)
        # A step of 12 bits is less than a bin, in which the density is not uniform.
        close = 0.03 if bits < 9 else 0.1
        assert float(squared_error(histogram, low, high, bits)) == pytest.approx(want, rel=close)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=30),
    st.lists(st.floats(-1, 1, width=32), max_size=30),
    st.integers(1, 16),
)
def test_ranges_are_inside_minmax_and_mse_is_no_worse(a: list[float], b: list[float], bits: int) -> None:
    histogram = histogram_of(torch.tensor([*a, *b], dtype=torch.float32))
    full = minmax_ends(histogram)
    for found in (percentile_ends(histogram, 99), mse_ends(histogram, bits), entropy_ends(histogram, bits)):
        low, high = ends_of(found)
        assert float(full[0]) <= low <= 0 <= high <= float(full[1])
        assert bool(grid_of(found, bits=bits).scale.decode() > 0)
        assert (low, high) != (0, 0) or float(full[1] - full[0]) == 0
    errors = [float(squared_error(histogram, *found, bits)) for found in (mse_ends(histogram, bits), full)]
    assert errors[0] <= errors[1]


def slow_entropy(x: np.ndarray, histogram: ValueHistogram, bits: int) -> tuple[float, float]:
    """Migacz's method on the values, bin by bin, with both signs on one grid."""
    edges, levels = histogram.edges.numpy(), 2**bits
    counts = np.histogram(x[x != 0], edges)[0].astype(float)
    zero, filled = -histogram.first, np.flatnonzero(counts)
    start, stop = min(filled[0], zero), max(filled[-1] + 1, zero)
    best, found = np.inf, (float(x.min()), float(x.max()))
    for reach in range(max(zero - start, stop - zero), 0, -STRIDE):
        a, b = max(start, zero - reach), min(stop, zero + reach)
        if b - a < levels:
            break
        inside = counts[a:b]
        if inside.sum() < counts.sum() / 2:
            break
        p, q = inside.copy(), np.zeros(b - a)
        p[0] += counts[:a].sum()
        p[-1] += counts[b:].sum()
        for j in range(levels):
            cut = slice(j * (b - a) // levels, (j + 1) * (b - a) // levels)
            some = p[cut] > 0
            if some.any():
                q[cut][some] = (inside[cut].sum() or 0.5) / some.sum()
        # scipy divides q by its sum; the levels that got half a count are not in it here.
        kl = float(entropy(p, q)) + np.log(inside.sum() / q.sum())
        if kl < best - 1e-12:
            best, found = kl, (edges[a], edges[b])
    return max(found[0], float(x.min()), -np.inf), min(found[1], float(x.max()))


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_entropy_is_migaczs(kind: str, bits: int) -> None:
    x = values_of(kind)
    histogram = histogram_of(x)
    low, high = ends_of(entropy_ends(histogram, bits))
    want = slow_entropy(x.double().numpy(), histogram, bits)
    assert (low, high) == pytest.approx((min(want[0], 0), max(want[1], 0)), abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_entropy_does_not_clip_values_away_from_zero_to_one_code(bits: int) -> None:
    """A histogram clipped to one bin has no divergence from itself."""
    low, high = ends_of(entropy_ends(histogram_of(values_of("negative")), bits))
    assert high == 0
    assert low < -0.6


@pytest.mark.parametrize("kind", ["tail", "relu tail", "silu"])
def test_entropy_is_not_minmax(kind: str) -> None:
    histogram = histogram_of(values_of(kind, size=1_000_000))
    low, high = ends_of(entropy_ends(histogram, 8))
    full = ends_of(minmax_ends(histogram))
    assert high < full[1] * 0.9
    if kind == "tail":
        assert low > full[0] * 0.9


def test_zeros_do_not_move_a_threshold() -> None:
    x = values_of("relu tail")
    sparse = torch.cat([x, torch.zeros(9 * N)])
    a, b = histogram_of(x), histogram_of(sparse)
    assert ends_of(entropy_ends(a, 8)) == ends_of(entropy_ends(b, 8))
    assert ends_of(mse_ends(a, 8)) == ends_of(mse_ends(b, 8))
