"""Smoothing: the predicted noise is what rounding costs, and the factors are never worse than none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.smoothing import noise, smoothing


def layer(seed: int, outliers: int) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and inputs [N, I], some of which are large."""
    draw = torch.Generator().manual_seed(seed)
    w, x = (torch.randn(size, generator=draw).double() for size in ((12, 16), (4000, 16)))
    x[:, :outliers] *= 40
    return w, x


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
    s, gain = smoothing(w, low, high, power, bits=8, input_bits=8)
    for factors in (ones, s):
        predicted = noise(w, low, high, power, factors, 8, 8)
        assert predicted == pytest.approx(rounded(w, x, factors), rel=0.35)
    assert gain == pytest.approx(rounded(w, x, s) / rounded(w, x, ones), rel=0.5)
    assert (gain < 0.3) == (outliers > 0)


@given(st.integers(0, 1000), st.integers(0, 4), st.integers(0, 15), st.integers(0, 15))
def test_never_worse_than_none(seed: int, outliers: int, dead: int, unused: int) -> None:
    w, x = layer(seed, outliers)
    x[:, dead], w[:, unused] = 0, 0
    s, gain = smoothing(w, x.amin(0), x.amax(0), x.square().mean(0), bits=8, input_bits=8)
    assert gain <= 1
    assert (s > 0).all()
    assert s.isfinite().all()
    assert s[dead] == 1
    assert s[unused] == 1


def test_a_layer_that_reads_nothing_is_left_alone() -> None:
    zero = torch.zeros(4)
    s, gain = smoothing(torch.randn(3, 4), zero, zero, zero, bits=8, input_bits=8)
    assert torch.equal(s, torch.ones(4).double())
    assert gain == 1
