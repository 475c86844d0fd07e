"""Uniform grids against slow loops, bounds, numpy's percentile and a direct version of Migacz's method."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.maths import ranges
from tersor.maths.uniform_grid import RANGES, dequantize, expand, limits, requantize, uniform_grid
from tersor.maths.units import PER, TINY

SHAPES = [(1, 1), (7, 1), (1, 7), (3, 5), (4, 8), (5, 13)]
KINDS = ["normal", "constant", "zero", "denormal", "huge", "outlier", "positive", "negative"]


def weights(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "constant":
        return torch.full(shape, -0.37)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "denormal":
        return w * 1e-41
    if kind == "huge":
        return w.clamp(-1, 1) * 3e38
    if kind == "outlier":
        w[0, 0] = 100.0
    return {"positive": w.abs(), "negative": -w.abs()}.get(kind, w)


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "shape": st.sampled_from(SHAPES),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    cases,
    st.integers(1, 16),
    st.sampled_from(PER),
    st.sampled_from([1, 3, 4, 64]),
    st.tuples(st.booleans(), st.booleans(), st.sampled_from(RANGES)),
)
def test_grids_are_well_formed(case, bits, per, group, options):
    symmetric, masked, range_ = options
    symmetric = symmetric and bits > 1
    w = weights(**case)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    codes, scale, zero = uniform_grid(
        w, bits, per=per, group=group, symmetric=symmetric, range=range_, ends=(-0.5, 2.0), keep=keep
    )
    rows, columns = w.shape
    want = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, math.ceil(columns / group))}[per]
    assert tuple(scale.shape) == want
    assert scale.dtype == torch.float32
    assert (scale >= TINY).all()
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    low, high = limits(bits, symmetric)
    assert codes.min() >= low
    assert codes.max() <= high
    if symmetric:
        assert zero is None
    else:
        assert tuple(zero.shape) == want
        assert zero.min() >= low
        assert zero.max() <= high
    decoded = dequantize(codes, scale, zero, group)
    assert torch.isfinite(decoded).all()
    assert torch.equal(codes, requantize(w, scale, zero, bits, group, symmetric))
    assert (decoded[w == 0] == 0).all()


@settings(max_examples=200, deadline=None)
@given(cases, st.integers(1, 16), st.sampled_from(PER), st.sampled_from([1, 3, 64]), st.booleans())
def test_minmax_rounds_by_at_most_half_a_step(case, bits, per, group, symmetric):
    w = weights(**case)
    if (case["kind"] == "huge" and not symmetric) or bits == 1:
        return
    codes, scale, zero = uniform_grid(w, bits, per=per, group=group, symmetric=symmetric)
    half = expand(scale, group, w.shape[1]) / 2
    gap = (dequantize(codes, scale, zero, group).double() - w.double()).abs()
    assert (gap <= half.double() + w.abs().amax().double() * 3e-7).all()


def slow(w, bits, symmetric):
    """The textbook algorithm for one unit, a list of floats, with range minmax."""
    first, last = limits(bits, symmetric)
    if symmetric:
        scale = max(abs(v) for v in w) / last or 1.0
        return [max(first, min(last, round(v / scale))) * scale for v in w]
    low, high = min(0.0, *w), max(0.0, *w)
    scale = (high - low) / (last - first) or 1.0
    zero = max(first, min(last, round(first - low / scale)))
    return [(max(first, min(last, round(v / scale) + zero)) - zero) * scale for v in w]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 11])
@pytest.mark.parametrize("ends", [(-0.75, 0.75), (-0.2, 0.9), (0.0, 0.5), (-3.0, 0.0)])
def test_a_fixed_range_is_that_of_weights_that_span_it(bits, ends):
    """The grid is the textbook grid of the two ends, for weights inside or outside of the range."""
    w = torch.randn(3, 17, generator=torch.Generator().manual_seed(bits)) * 0.5
    symmetric = ends[0] == -ends[1]
    codes, scale, zero = uniform_grid(w, bits, per="channel", symmetric=symmetric, range="fixed", ends=ends)
    got = dequantize(codes, scale, zero, 0)
    for row, decoded in zip(w.tolist(), got.tolist(), strict=True):
        clipped = [min(max(v, ends[0]), ends[1]) for v in row]
        assert decoded == pytest.approx(slow([*clipped, *ends], bits, symmetric)[:-2], abs=1e-6)


@pytest.mark.parametrize("ends", [None, (0.1, 1.0), (-1.0, -0.1)])
def test_a_fixed_range_holds_zero(ends):
    with pytest.raises(SettingError, match="low <= 0 <= high"):
        uniform_grid(torch.ones(2, 2), 4, range="fixed", ends=ends)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 11, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_match_a_slow_loop(bits, symmetric):
    w = torch.randn(5, 13, generator=torch.Generator().manual_seed(bits)) + 0.5
    codes, scale, zero = uniform_grid(w, bits, per="group", group=4, symmetric=symmetric)
    got = dequantize(codes, scale, zero, 4)
    for row in range(5):
        for g in range(0, 13, 4):
            want = torch.tensor(slow(w[row, g : g + 4].double().tolist(), bits, symmetric))
            assert torch.allclose(got[row, g : g + 4], want, atol=1e-6)


def test_one_bit_is_zero_and_the_farther_end():
    w = torch.tensor([[-0.2, 1.0, 0.6, 0.3], [0.2, -1.0, -0.6, -0.3]])
    codes, scale, zero = uniform_grid(w, 1, symmetric=False)
    assert dequantize(codes, scale, zero, 64).tolist() == [[0, 1, 1, 0], [0, -1, -1, 0]]
    with pytest.raises(SettingError, match="symmetric=False"):
        uniform_grid(w, 1)


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(1, 8), st.sampled_from(PER), st.booleans(), st.booleans())
def test_mse_is_never_worse_than_minmax(case, bits, per, symmetric, masked):
    symmetric = symmetric and bits > 1
    if case["kind"] == "huge":
        return
    w = weights(**case)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    counts = torch.ones_like(w) if keep is None else keep

    def error(range_):
        grid = uniform_grid(w, bits, per=per, group=4, symmetric=symmetric, range=range_, keep=keep)
        return ((dequantize(*grid, 4).double() - w.double()).square() * counts).sum()

    assert error("mse") <= error("minmax") * (1 + 1e-5) + 1e-80


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_near_the_best_of_a_dense_search(bits, symmetric):
    if bits == 1 and symmetric:
        return
    w = torch.randn(6, 101, generator=torch.Generator().manual_seed(bits)) ** 3 + 0.1
    codes, scale, zero = uniform_grid(w, bits, symmetric=symmetric, range="mse")
    got = (dequantize(codes, scale, zero, 64) - w).square().sum(1)
    first, last = limits(bits, symmetric)
    top = w.abs().amax(1, keepdim=True)
    best = torch.full((6,), torch.inf)
    for z in [0] if symmetric else range(first, last + 1, max(1, 2**bits // 16)):
        for f in torch.linspace(0.005, 1, 100):
            s = top * f * (2 if not symmetric else 1) / (last - first if not symmetric else last)
            decoded = ((w / s).round() + z).clamp(first, last).sub(z) * s
            best = torch.minimum(best, (decoded - w).square().sum(1))
    assert (got <= best * 1.05).all()
    assert got.sum() <= best.sum() * 1.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_cannot_be_improved_by_rescaling(symmetric):
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(9)).double()
    codes, scale, zero = uniform_grid(w.float(), 3, symmetric=symmetric, range="mse")
    steps = codes.double() - (0 if zero is None else zero.double())
    best = (steps * w).sum(1) / steps.square().sum(1)
    assert torch.allclose(scale[:, 0].double(), best, rtol=5e-3)


def test_mse_helps_with_outliers():
    w = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) ** 3
    plain, fitted = uniform_grid(w, 4), uniform_grid(w, 4, range="mse")
    errors = [(dequantize(*g, 64) - w).square().sum() for g in (plain, fitted)]
    assert errors[1] < errors[0] * 0.7


@pytest.mark.parametrize("masked", [False, True])
def test_percentile_is_numpys(masked):
    w = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    _, scale, _ = uniform_grid(w, 8, range="percentile", percentile=97.3, keep=keep)
    _, wide, zero = uniform_grid(w, 8, range="percentile", percentile=97.3, keep=keep, symmetric=False)
    for row in range(4):
        values = (w[row] if keep is None else w[row][keep[row]]).double().numpy()
        assert math.isclose(scale[row, 0], np.percentile(abs(values), 97.3) / 127, rel_tol=1e-5)
        low, high = np.percentile(values, [100 - 97.3, 97.3])
        assert math.isclose(wide[row, 0], (high - low) / 255, rel_tol=1e-5)
        assert zero[row, 0] == round(-128 - low / wide[row, 0].item())


def test_percentile_does_not_empty_a_sparse_row():
    w = torch.zeros(1, 5000)
    w[0, 3] = 2.0
    for symmetric in (True, False):
        codes, scale, zero = uniform_grid(w, 8, range="percentile", percentile=99, symmetric=symmetric)
        assert torch.allclose(dequantize(codes, scale, zero, 64), w)


def migacz(values, levels):
    """The method of the slides, in loops, with the same thresholds."""
    histogram, _ = np.histogram(values, bins=2048, range=(0, values.max()))
    best, share = math.inf, 1.0
    for n in range(2048, max(levels, 16) - 1, -16):
        inside = histogram[:n].astype(float)
        p = inside.copy()
        p[-1] += histogram[n:].sum()
        q = np.zeros(n)
        for j in range(levels):
            cut = slice(j * n // levels, (j + 1) * n // levels)
            nonempty = p[cut] > 0
            if nonempty.any():
                count = inside[cut].sum() or 0.5
                q[cut][nonempty] = count / nonempty.sum()
        if inside.sum() == 0:
            continue
        some = p > 0
        kl = float((p[some] / p.sum() * np.log((p[some] / p.sum()) / (q[some] / inside.sum()))).sum())
        if kl < best - 1e-12:
            best, share = kl, n / 2048
    return share


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("tail", [1.0, 2.0])
def test_entropy_threshold_is_migaczs(bits, tail):
    w = torch.randn(3, 4000, generator=torch.Generator().manual_seed(bits)).double()
    w = (w.abs() ** tail * w.sign()).float()
    low, high = ranges.entropy_range(w, None, bits)
    for row in range(3):
        size = w[row].abs().double().numpy()
        want = migacz(size, 2 ** (bits - 1)) * size.max()
        assert math.isclose(torch.maximum(-low, high)[row], want, rel_tol=1e-6)


def test_entropy_clips_and_short_rows_share_a_threshold():
    w = torch.randn(300, 64, generator=torch.Generator().manual_seed(3)) ** 3
    _, plain, _ = uniform_grid(w, 4)
    _, fitted, _ = uniform_grid(w, 4, range="entropy")
    assert (fitted <= plain).all()
    assert (fitted < plain * 0.999).float().mean() > 0.2
    _, far, _ = uniform_grid(w, 12, range="entropy")
    assert torch.equal(far, uniform_grid(w, 12)[1])


def test_masked_weights_do_not_influence_the_grid():
    w = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 3] = False
    loud = w.clone()
    loud[:, 3] = 1e6
    for range_ in RANGES:
        for per in PER:
            a = uniform_grid(w, 4, per=per, group=4, range=range_, ends=(-1.0, 1.0), keep=keep)[1]
            b = uniform_grid(loud, 4, per=per, group=4, range=range_, ends=(-1.0, 1.0), keep=keep)[1]
            assert torch.equal(a, b), (range_, per)


def test_expand_repeats_groups():
    scale = torch.tensor([[1.0, 2.0, 3.0]])
    assert expand(scale, 2, 5).tolist() == [[1, 1, 2, 2, 3]]
    with pytest.raises(SettingError, match="3 groups of 2"):
        expand(scale, 2, 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 17}, "1 to 16"),
        ({"bits": 0}, "1 to 16"),
        ({"bits": 4, "per": "chanels"}, "did you mean 'channel'"),
        ({"bits": 4, "range": "msee"}, "did you mean 'mse'"),
        ({"bits": 4, "per": "group", "group": 0}, "group=0"),
        ({"bits": 4, "range": "percentile", "percentile": 0.999}, "in percent"),
        ({"bits": 4, "keep": torch.ones(2, 2)}, "bool mask"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(SettingError, match=text):
        uniform_grid(torch.ones(2, 3), **options)


def test_nan_is_refused():
    with pytest.raises(SettingError, match="1 of 2 weights are NaN"):
        uniform_grid(torch.tensor([[1.0, torch.nan]]), 8)


def test_low_precision_inputs_work():
    w = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        codes, scale, zero = uniform_grid(w.to(dtype), 8)
        assert torch.allclose(dequantize(codes, scale, zero, 64), w, atol=0.02)
