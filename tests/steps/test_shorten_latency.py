"""Shorten by latency: the clock decides, the table only steers, and a point that is coarse is named."""

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tersor
from tersor.errors import RefusedError, SettingError
from tersor.model.graph import arguments, value

pytest.importorskip("onnxruntime")
WIDE, BLOCKS = 16, 6
STEP = tersor.Shorten(keep=0.5, of="latency", correct=False)


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.one(x).relu())).relu()


class Net(nn.Module):
    def __init__(self, inner: Iterable[int], width: int = WIDE) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.Sequential(*(Block(width, n) for n in inner))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x).relu()).mean((2, 3)))


def given(inner: Iterable[int], width: int = WIDE, size: int = 8) -> tuple[Net, tersor.Task]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, size, size, generator=random)
    torch.manual_seed(0)
    return Net(inner, width).eval(), tersor.Task(
        "latency", evaluate=[(x, torch.zeros(4, dtype=torch.int64))], calibrate=[(x,)]
    )


def weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.blocks.parameters())  # type: ignore[union-attr]


def clock(monkeypatch: pytest.MonkeyPatch, time: Callable[[nn.Module], float]) -> list[float]:
    """Time by `time`, in place of a runtime; the table says the elements of each weight. Returns the shares
    that are measured."""
    seen: list[float] = []

    def against(self: Any, net: nn.Module) -> tuple[float, float]:
        whole = time(self.view.plain())
        seen.append(time(net) / whole)
        return whole, seen[-1]

    def times(nodes: Iterable[fx.Node], _: Any) -> dict[fx.Node, float]:
        found = [(node, arguments(node).get("weight")) for node in nodes]
        return {node: float(value(w).numel()) for node, w in found if isinstance(w, fx.Node)}

    monkeypatch.setattr("tersor.steps.slim_latency.Stopwatch.against", against)
    monkeypatch.setattr("tersor.steps.branch_costs.operator_times", times)
    return seen


def budget(result: tersor.State) -> Any:
    (note,) = result.ledger.notes("budget")
    return note


def test_the_time_that_is_asked_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net, task = given([WIDE] * BLOCKS)
    clock(monkeypatch, weights)
    result = tersor.run(net, STEP, task)
    assert weights(result.model()) == weights(net) / 2
    assert "latency: 50.0% kept, 50.0% asked" in budget(result).text
    assert "nearest point" not in budget(result).text
    assert (
        f"{weights(net):.4f} ms before, {weights(net) / 2:.4f} after in onnxruntime, batch 1"
        in budget(result).text
    )


def test_more_branches_go_until_the_clock_is_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the time are between operators, which the table does not know."""
    net, task = given([WIDE] * BLOCKS)
    fixed = 0.5 * weights(net)
    seen = clock(monkeypatch, lambda model: fixed + weights(model))
    result = tersor.run(net, tersor.Shorten(keep=0.7, of="latency", correct=False), task)
    # (0.5 + share) / 1.5 <= 0.7 * 1.05: three of six blocks, where the table alone says two
    assert weights(result.model()) == weights(net) / 2
    assert seen[1] > 0.7 * 1.05


def test_a_point_that_is_coarse_is_the_nearest_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, task = given([WIDE] * 3)  # shares: 2/3, 1/3, 0
    clock(monkeypatch, weights)
    for unmet, blocks in (("refuse", 1), ("nearest", 2)):  # 0.6 is nearer to 2/3, which is slower than asked
        step = tersor.Shorten(keep=0.6, of="latency", correct=False, unmet=unmet)
        result = tersor.run(net, step, task)
        assert weights(result.model()) == blocks * weights(net) / 3
        assert f"latency: {blocks / 3:.1%} kept, 60.0% asked" in budget(result).text
        assert "branches are coarse, and this is the nearest point" in budget(result).text


def test_a_budget_that_all_branches_do_not_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, task = given([WIDE] * 3)
    clock(monkeypatch, lambda model: weights(net) + weights(model))
    step = tersor.Shorten(keep=0.3, of="latency", correct=False)
    with pytest.raises(RefusedError, match=r"without all branches that may go 50\.0% stays, 30\.0% asked"):
        tersor.run(net, step, task)
    nearest = tersor.Shorten(keep=0.3, of="latency", correct=False, unmet="nearest")
    assert weights(tersor.run(net, nearest, task).model()) == 0


def test_rounds_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    net, task = given([WIDE] * BLOCKS)
    clock(monkeypatch, weights)
    task = tersor.Task("latency", evaluate=task.evaluate, calibrate=task.calibrate, train=task.evaluate)
    step = tersor.Shorten(keep=0.33, of="latency", correct=False, rounds=2, epochs=1, lr=1e-5)
    assert weights(tersor.run(net, step, task).model()) == weights(net) / 3


@pytest.mark.wide
def test_times_are_those_of_onnx_runtime() -> None:
    """Six equal blocks that take all of the time: half of the time is about half of them."""
    net, task = given([64] * BLOCKS, width=64, size=24)
    result = tersor.run(net, STEP, task)
    left = sum(isinstance(block, Block) for block in result.model().blocks)
    assert 2 <= left <= 4
    note = budget(result)
    measured = float(re.search(r"latency: ([\d.]+)% kept", note.text)[1]) / 100  # type: ignore[index]
    assert measured == pytest.approx(left / BLOCKS, abs=0.17)
    assert measured <= 0.5 * 1.05


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"of": "latency", "runtime": "openvino"}, "openvino"),
        ({"runtime": "onnxruntime", "threads": 2}, "latency"),
        ({"of": "latency", "threads": 0}, "threads=0"),
        ({"of": "latency", "batch": 0}, "batch=0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        tersor.Shorten(**settings)


def test_a_missing_runtime_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # a fresh import of it fails
    with pytest.raises(tersor.MissingError, match="onnxruntime"):
        tersor.Shorten(of="latency")
