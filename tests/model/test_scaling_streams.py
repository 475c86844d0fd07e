"""Scaling streams: other scales of the channels leave a network's outputs; nothing else is scaled."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.scaled_rows import along
from tersor.model.scaling_streams import Stream, scaling_streams


class Mixed(nn.Module):
    """Residual blocks, a depthwise convolution, padding, a pool, a flattened map, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.gate, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc, self.head = nn.Linear(4 * 2 * 2, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.depth(F.pad(x, (1, 1, 1, 1)))
        x = x + self.b(F.leaky_relu(self.a(x)))
        x = self.gate(x)
        x = F.avg_pool2d(F.relu(self.last(x * x.sigmoid())), 2)
        return self.head(F.relu(self.fc(x.flatten(1))))


def scaled(net: nn.Module, stream: Stream, s: Tensor) -> nn.Module:
    new = copy.deepcopy(net)
    tensors = dict(new.named_parameters())
    with torch.no_grad():
        for names in stream.makers:
            for name in names:
                tensors[name].mul_(along(s, 0, tensors[name].ndim))
        for read in stream.readers:
            tensors[read.weight].mul_(read.columns(1 / s, tuple(tensors[read.weight].shape)))
    return new


def channels(net: nn.Module, stream: Stream) -> int:
    return len(dict(net.named_parameters())[stream.makers[0][0]])


def test_any_positive_scales_leave_the_outputs() -> None:
    torch.manual_seed(0)
    net, x = Mixed().double().eval(), torch.randn(4, 3, 14, 14, dtype=torch.float64)
    streams, left = scaling_streams(net, (x,))
    makers = [{names[0] for names in stream.makers} for stream in streams]
    assert {"stem.weight", "depth.weight", "b.weight"} in makers  # the residual stream
    assert {"a.weight"} in makers
    assert {"last.weight"} in makers
    assert {"fc.weight"} in makers
    assert left.keys() == {"gate.weight", "head.weight"}
    assert "sigmoid" in left["gate.weight"] or "mul" in left["gate.weight"]
    for stream in streams:
        s = torch.rand(channels(net, stream), dtype=torch.float64) + 0.5
        assert torch.allclose(scaled(net, stream, s)(x), net(x), rtol=1e-9, atol=1e-12)
        half = replace(stream, readers=[])
        assert not torch.allclose(scaled(net, half, s)(x), net(x))  # the scales do matter


class Clipped(nn.Module):
    """relu6, a clamp from below 0, a product with itself through two views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x))
        x = self.b(x).clamp(-1, 1)
        return self.head(self.c(x).mean((2, 3)))


def test_relu6_takes_scales_that_stay_below_it_and_a_clamp_of_negatives_takes_none() -> None:
    torch.manual_seed(0)
    net, x = Clipped().double().eval(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    streams, left = scaling_streams(net, (x,))
    assert "b.weight" in left
    first = next(s for s in streams if s.makers[0][0] == "a.weight")
    assert first.top == 6
    high = F.relu6(net.a(x)).amax((0, 2, 3))
    assert (high > 0).all()
    assert (high < 6).all()
    assert torch.allclose(scaled(net, first, 6 / high)(x), net(x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(scaled(net, first, 9 / high)(x), net(x))


@pytest.mark.parametrize("spoil", ["broadcast", "constant", "output", "shared"])
def test_what_depends_on_the_scale_keeps_it(spoil: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = F.relu(self.a(x))
            if spoil == "broadcast":
                y = y + y.mean(1, keepdim=True)
            if spoil == "constant":
                y = y + 1
            if spoil == "shared":
                y = self.a(y)
            return (self.b(y), y) if spoil == "output" else self.b(y)

    streams, _ = scaling_streams(Net().eval(), (torch.randn(3, 4),))
    assert streams == []


def test_only_tensors_with_an_axis_of_samples_are_cut_to_few() -> None:
    """A mask of places by places is as wide as long, whatever the number of samples."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a((x @ x.mT + mask) @ x).relu())

    streams, _ = scaling_streams(Masked().eval(), {"x": torch.randn(6, 5, 8), "mask": torch.ones(5, 5)})
    assert [stream.makers for stream in streams] == [[("a.weight", "a.bias")]]
