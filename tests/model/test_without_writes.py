"""Graphs without in-place writes: the same outputs, and no write where memory is shared."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.dead_units import clear
from tersor.model.graph import written
from tersor.model.nan_propagation import Known, followed

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Called(nn.Module):
    """A layer, a function of what it gives, a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.last = nn.Linear(6, 6), function, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def residual(h: Tensor) -> Tensor:
    y = h.sin()
    y += h
    return y.relu_()


def read_before(h: Tensor) -> Tensor:
    early = h.abs()
    h.clamp_(-0.5, 0.5)
    return early + h


def a_view_is_read_later(h: Tensor) -> Tensor:
    part = h[:, :3]
    h.relu_()
    return torch.cat([part, h[:, 3:]], 1)  # both have the relu


def a_part_is_written(h: Tensor) -> Tensor:
    h = h.sin()
    h[:, 1:3] *= 2
    return h


def same_memory_under_another_name(h: Tensor) -> Tensor:
    other = F.dropout(h, 0.5, training=False)  # the same memory in eval mode, and no view by its schema
    h.relu_()
    return other + h


@pytest.mark.parametrize(
    ("function", "free"),
    [
        (lambda h: F.relu(h, inplace=True), True),
        (lambda h: F.hardswish(h, inplace=True), True),
        (residual, True),
        (read_before, True),
        (a_view_is_read_later, False),
        (a_part_is_written, False),
        (same_memory_under_another_name, False),
    ],
)
def test_the_graph_computes_the_same(function: Callable[[Tensor], Tensor], free: bool) -> None:
    model = Called(function).eval()
    seen = followed(model, (X,))  # it compares with the model itself too
    assert (not any(map(written, seen.graph.nodes))) == free
    with torch.no_grad():
        (found,) = seen.outputs([X], lambda node, x, out: out)
        assert torch.allclose(found, model(X), atol=1e-6)


def test_an_argument_is_still_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.relu_())

    assert any(map(written, followed(Writes().eval(), (X.clone(),)).graph.nodes))


def deep(inplace: bool) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 1)]
    for _ in range(8):
        layers += [nn.ReLU(inplace=inplace), nn.Conv2d(64, 64, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        for layer in (m for m in model if isinstance(m, nn.Conv2d)):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.05)
    return model.eval()


def test_units_of_networks_that_write_in_place_are_not_tried_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """timm's MobileNetV4 took more than 5 minutes: some 1,000 passes found no unit that is dead."""
    plain, count = Known.run, Counter[bool]()
    cleared: dict[bool, dict[str, Tensor]] = {}
    for inplace in (False, True):

        def run(*args: Any, inplace: bool = inplace, **more: Any) -> Any:
            count[inplace] += 1
            return plain(*args, **more)

        monkeypatch.setattr(Known, "run", run)
        model = deep(inplace)
        names = [name for name, _ in model.named_parameters()]
        cleared[inplace] = clear(model, (torch.randn(4, 3, 2, 2),), names, names)
    assert count[True] == count[False] > 0
    assert cleared[True].keys() == cleared[False].keys() != set()
    assert all(torch.equal(cleared[True][name], value) for name, value in cleared[False].items())
