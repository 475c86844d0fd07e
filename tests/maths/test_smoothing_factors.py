"""Smoothing: the predicted noise is what rounding costs, and the factors are never worse than none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.smoothing import ALPHAS, factors, noise, smoothing


def layer(seed: int, outliers: int) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and inputs [N, I], some of which are large."""
    draw = torch.Generator().manual_seed(seed)
    w, x = (torch.randn(size, generator=draw).double() for size in ((12, 16), (4000, 16)))
    x[:, :outliers] *= 40
    return w, x


def halves(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first, second = x.chunk(2)
    return (first.amin(0), first.amax(0)), (second.amin(0), second.amax(0))


def smoothed(w: Tensor, x: Tensor) -> tuple[Tensor, float]:
    return smoothing(w, halves(x), x.square().mean(0), len(x), bits=8, input_bits=8)


def rounded(w: Tensor, x: Tensor, s: Tensor) -> float:
    """The squared error of all outputs of one sample, measured by rounding."""
    ws, xs = w * s, x / s
    step = (xs.amax().clamp_min(0) - xs.amin().clamp_max(0)) / 255
    steps = ws.abs().amax(1, keepdim=True) / 127
    apart = (xs / step).round() * step @ ((ws / steps).round() * steps).T - x @ w.T
    return float(apart.square().sum(1).mean())


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_the_predicted_noise_is_what_rounding_costs(outliers: int) -> None:
    w, x = layer(0, outliers)
    low, high, power = x.amin(0), x.amax(0), x.square().mean(0)
    ones = torch.ones(16).double()
    s, gain = smoothed(w, x)
    for each in (ones, s):
        assert noise(w, low, high, power, each, 8, 8) == pytest.approx(rounded(w, x, each), rel=0.35)
    assert gain >= 0.5 * rounded(w, x, s) / rounded(w, x, ones)  # it counts what may be clipped too
    assert (gain < 0.35) == (outliers > 0)


@given(st.integers(0, 1000), st.integers(0, 4), st.integers(0, 15), st.integers(0, 15))
def test_never_worse_than_none(seed: int, outliers: int, dead: int, unused: int) -> None:
    w, x = layer(seed, outliers)
    x[:, dead], w[:, unused] = 0, 0
    s, gain = smoothed(w, x)
    assert gain <= 1
    assert (s > 0).all()
    assert s.isfinite().all()
    assert s[dead] == 1
    assert s[unused] == 1


def test_a_layer_that_reads_nothing_is_left_alone() -> None:
    s, gain = smoothed(torch.randn(3, 4), torch.zeros(6, 4).double())
    assert torch.equal(s, torch.ones(4).double())
    assert gain == 1


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_what_calibration_saw_of_rare_inputs_is_no_bound(rate: float) -> None:
    """Each channel fires in few samples, as behind a pool. Judged by rounding on 1,100 other samples."""
    draw = torch.Generator().manual_seed(0)
    w, x = (
        torch.randn(20, 256, generator=draw).double(),
        torch.randn(1200, 256, generator=draw).double().abs(),
    )
    x *= torch.rand(1200, 256, generator=draw) < rate
    shown, others = x[:100], x[100:]
    low, high, power = shown.amin(0), shown.amax(0), shown.square().mean(0)
    costs, steps = {}, torch.linspace(0, 1, 256).double()
    for alpha in (None, *ALPHAS):
        s = factors(w, low, high, alpha)
        grid = steps * (high / s).amax()
        nearest = grid[torch.bucketize(others / s, (grid[1:] + grid[:-1]) / 2)]
        costs[alpha] = float((((nearest * s - others) @ w.T) ** 2).sum(1).mean())
    by_rounding = {a: noise(w, low, high, power, factors(w, low, high, a), 8, 8) for a in costs}
    best = min(by_rounding, key=by_rounding.__getitem__)
    assert by_rounding[best] < 0.7 * by_rounding[None]
    assert costs[best] > 100 * costs[None]
    s, gain = smoothed(w, shown)
    assert gain == 1
    assert torch.equal(s, torch.ones_like(s))
