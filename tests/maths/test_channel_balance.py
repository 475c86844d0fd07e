"""Channel balance: the noise is that of rounding, measured; scales lower it and keep their limits."""

import pytest
import torch
from torch import Tensor

from tersor.maths.channel_balance import Reader, balanced, noise, room
from tersor.maths.uniform_grid import dequantize, uniform_grid


def channels(count: int = 24, samples: int = 8000) -> Tensor:
    """Values behind a relu [N, C], channel c 1.25 times as large as the one before it."""
    torch.manual_seed(0)
    return torch.rand(samples, count, dtype=torch.float64) * 1.25 ** torch.arange(count)


def measured(x: Tensor, w: Tensor, s: Tensor) -> float:
    """The mean squared error of x w over its power, with x s and w / s on grids of 8 bits."""
    scaled = x * s
    step = scaled.max() / 255
    codes, scale, _ = uniform_grid((w / s).float(), 8)
    out = (scaled / step).round() * step @ dequantize(codes, scale, None, 0).double().T
    exact = x @ w.T
    return float((out - exact).square().sum(1).mean() / (w.square() @ x.square().mean(0)).sum())


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_the_noise_is_that_of_rounding(spread: float) -> None:
    x = channels()
    w = torch.randn(64, 24, dtype=torch.float64)
    s = x.amax(0) ** -spread
    ends = torch.zeros(24, dtype=torch.float64), x.amax(0)
    reader = Reader.of(w, 1, 1)
    seen = reader.square.sum(0) / (reader.square @ x.square().mean(0)).sum()
    found = noise(s, [ends], x.square().mean(0), [reader], seen, 8)
    assert found == pytest.approx(measured(x, w, s), rel=0.25)


def test_scales_lower_the_error() -> None:
    x, w = channels(), torch.randn(64, 24, dtype=torch.float64)
    w = w / 1.25 ** torch.arange(24)
    ends = torch.zeros(24, dtype=torch.float64), x.amax(0)
    s, gain = balanced([ends], x.square().mean(0), [Reader.of(w, 1, 1)], 8)
    after, before = measured(x, w, s), measured(x, w, torch.ones_like(s))
    assert after / before == pytest.approx(gain, rel=0.3)
    assert after < 0.1 * before


def test_below_a_top_no_channel_shrinks_or_leaves_it() -> None:
    high = torch.tensor([6.0, 3.0, 0.1, 0.0], dtype=torch.float64)
    most = torch.tensor([1.0, 1.7, 50.0, 1.0], dtype=torch.float64)
    w = torch.ones(4, 1, 3, 3)
    s, gain = balanced([(0 * high, high)], high.square() / 3, [Reader.of(w, 4, 1)], 8, most)
    assert gain < 0.8
    assert s[0] == 1
    assert s[3] == 1
    assert (s >= 1).all()
    assert (s <= most).all()
    assert (s[1:3] > 1).all()


def test_a_channel_has_room_for_values_that_calibration_did_not_show() -> None:
    torch.manual_seed(0)
    x = torch.randn(100000, 3, dtype=torch.float64) * torch.tensor([0.2, 0.2, 2.0]) + torch.tensor([0, -1, 1])
    few = x[:50]
    high = few.amax(0).clamp(0, 6)
    found = room(6.0, high, few.mean(0), few.square().mean(0))
    assert (found >= 1).all()
    assert found[0] > 3
    assert (x.amax(0)[:2] * found[:2] <= 6).all()  # far beyond the 50 that were seen
    assert found[2] == 1


def test_channels_that_are_alike_keep_their_scales() -> None:
    high = torch.full((4,), 2.0, dtype=torch.float64)
    s, gain = balanced([(0 * high, high)], high.square() / 3, [Reader.of(torch.ones(5, 4), 1, 1)], 8)
    assert gain == pytest.approx(1)
    assert torch.allclose(s, s[0].expand(4))


def test_cells_of_groups_and_blocks() -> None:
    w = torch.arange(1.0, 9).reshape(4, 2)  # two groups of two outputs and two inputs
    peak = Reader.of(w, 2, 1).peak
    assert peak.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]]
    wide = Reader.of(torch.tensor([[1.0, -2, 3, 4]]), 1, 2)  # two channels of two inputs
    assert wide.peak.tolist() == [[2, 4]]
    assert wide.square.tolist() == [[5, 25]]
    assert wide.size == 2
