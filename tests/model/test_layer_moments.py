"""Layer moments: agree with slow loops, of two models that differ, for each kind of layer."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model import layer_rows as module
from tersor.model.layer_moments import calls_of, layer_moments
from tersor.model.layer_rows import stride_of
from tersor.model.loader import TensorBatches
from tersor.model.scaled_inputs import build
from tersor.model.task import Task


def task_of(x: Tensor, batch: int = 4) -> Task:
    y = torch.zeros(len(x), dtype=torch.int64)
    return Task("t", evaluate=TensorBatches(x, y, batch=batch), calibrate=TensorBatches(x, y, batch=batch))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 2), (6, 3)),
    "linear on tokens": (nn.Linear(3, 2, bias=False), (6, 5, 3)),
    "conv": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (6, 2, 7, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="reflect"), (6, 6, 4, 5)),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3, padding=1), (6, 3, 4, 4)),
    "conv 1-D": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (6, 4, 7)),
}


class Padded(nn.Conv2d):
    """Pads more behind than in front, as TensorFlow does, in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)


def test_what_a_forward_of_its_own_pads_is_read() -> None:
    layer, x = Padded(4, 4, 3, stride=2, groups=4), torch.randn(6, 4, 8, 8)
    stock = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, stride=2, groups=4))
    stock[1].load_state_dict(layer.state_dict())
    own = nn.Sequential(nn.Identity(), layer)
    found, want = (layer_moments(net, copy.deepcopy(net), task_of(x), {"1": 1})["1"] for net in (own, stock))
    assert found.count == 6 * 16
    assert torch.equal(found.xx, want.xx)
    assert torch.equal(found.yx, want.yx)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_a_slow_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input is measured by a layer whose weights are unit vectors; images are unfolded one by one."""
    monkeypatch.setattr(module, "AT_ONCE", 1)
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    old = nn.Sequential(nn.Identity(), layer)
    new = nn.Sequential(nn.Tanh(), copy.deepcopy(layer))
    found = layer_moments(old, new, task_of(x), {"1": 1})["1"]
    groups = getattr(layer, "groups", 1)
    columns = layer.weight[0].numel()
    with torch.no_grad():
        y = layer(x)
        if isinstance(layer, nn.Linear):
            seen, y = x.tanh().reshape(-1, 1, columns), y.reshape(-1, 1, y.shape[-1])
        else:
            same: dict[str, Any] = {
                k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode", "groups")
            }
            probe = type(layer)(layer.in_channels, columns * groups, layer.kernel_size, bias=False, **same)
            unit = torch.eye(columns).reshape(columns, *layer.weight.shape[1:])
            probe.weight.copy_(torch.cat([unit] * groups))
            seen = probe(x.tanh()).flatten(2).transpose(1, 2).reshape(-1, groups, columns)
            y = y.flatten(2).transpose(1, 2).reshape(-1, groups, y.shape[1] // groups)
    assert found.count == len(seen)
    xx, yx = torch.zeros(groups, columns + 1, columns + 1), torch.zeros(groups, y.shape[2], columns + 1)
    for row, out in zip(seen, y, strict=True):
        for g in range(groups):
            one = torch.cat([row[g], torch.ones(1)])
            xx[g] += torch.outer(one, one) / len(seen)
            yx[g] += torch.outer(out[g], one) / len(seen)
    torch.testing.assert_close(found.xx.float(), xx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.yx.float(), yx, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("images", "positions"), [(100, 784), (128, 784), (147, 784), (300, 49), (1, 9000)])
def test_positions_are_spread_over_the_whole_image(images: int, positions: int) -> None:
    step = stride_of(images, positions)
    assert math.gcd(step, positions) == 1
    taken = torch.arange(0, images * positions, step)
    assert len(taken) <= module.POSITIONS
    if len(taken) > positions:
        counts = torch.bincount(taken % positions, minlength=positions)
        assert int(counts.max() - counts.min()) <= 1


def test_a_sample_of_positions_is_the_same_in_inputs_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POSITIONS", 20)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(6, 2, 5, 5)
    with torch.no_grad():
        rows = module.input_rows(layer, x)[:, 0]
        expected = rows @ layer.weight.flatten(1).T + layer.bias
        torch.testing.assert_close(module.output_rows(layer, layer(x))[:, 0], expected, rtol=1e-4, atol=1e-5)
        assert len(rows) < 25
        monkeypatch.setattr(module, "AT_ONCE", 1)
        torch.testing.assert_close(module.input_rows(layer, x)[:, 0], rows)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.shared = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).relu()).relu())


def test_a_layer_that_runs_twice_counts_twice_and_layers_come_in_the_order_of_use() -> None:
    net, x = Twice(), torch.randn(6, 4)
    on = task_of(x)
    calls = calls_of(net, on, ["last", "shared"])
    assert calls == [{"shared": 2}, {"last": 1}]
    found = layer_moments(net, copy.deepcopy(net), on, {"shared": 2})["shared"]
    with torch.no_grad():
        both = torch.cat([x, net.shared(x).relu()])
    assert found.count == 12
    torch.testing.assert_close(found.xx[0, -1, :-1].float(), both.mean(0), rtol=1e-4, atol=1e-5)
    assert not net.shared._forward_hooks
    assert not net.last._forward_hooks


class Standardized(nn.Conv2d):
    """Computes with another weight than the one it stores."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_a_layer_that_computes_something_else_is_left_out() -> None:
    net = nn.Sequential(Standardized(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    found = layer_moments(net, copy.deepcopy(net), task_of(torch.randn(6, 2, 5, 5)), {"0": 1, "2": 1})
    assert list(found) == ["2"]


def test_the_inputs_of_a_layer_with_factors_are_what_its_weight_sees() -> None:
    net = nn.Sequential(build(nn.Linear(3, 2), "0", nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))))
    x = torch.randn(6, 3)
    found = layer_moments(net, copy.deepcopy(net), task_of(x), {"0": 1})["0"]
    expected = (x * torch.tensor([1.0, 2.0, 4.0])).mean(0)
    torch.testing.assert_close(found.xx[0, -1, :-1].float(), expected, rtol=1e-4, atol=1e-6)


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.k, self.out = (
            nn.Embedding(9, 4),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
            nn.Linear(3, 2),
        )

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(words)
        return self.out(self.q(x) * self.k(x))


def test_layers_that_read_the_same_are_together_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    net = Texts()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"words": torch.randint(0, 9, (2, 4)), "attention_mask": mask}
    on = Task("t", evaluate=[batch], calibrate=[batch], feed=lambda model, given: model(**given))
    calls = calls_of(net, on, ["q", "k", "out"])
    assert calls == [{"q": 1, "k": 1}, {"out": 1}]
    found = layer_moments(net, copy.deepcopy(net), on, calls[0])
    with torch.no_grad():
        x = net.words(batch["words"])[mask.bool()]
    for path in ("q", "k"):
        assert found[path].count == 4
        torch.testing.assert_close(found[path].xx[0, -1, :-1].float(), x.mean(0), rtol=1e-4, atol=1e-6)
