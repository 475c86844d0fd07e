"""Branches: which additions have a residual branch, which have none and why, on forwards of a few lines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.model.branches import branches
from tersor.model.bypass import Bypass
from tersor.model.graph import traced
from tersor.model.zeroed_edges import with_zeros


class Net(nn.Module):
    """Layers of one width, and a function that is the forward."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.a, self.b, self.c, self.wide = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.table, self.drop, self.run = nn.Parameter(torch.randn(4, 6)), nn.Dropout(0.3), run

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 6]
        return self.run(self, x)


def parallel(m: Any, x: Tensor) -> Tensor:
    n = m.norm(x := x.tanh())
    return m.c(x + m.a(n) + m.b(n))


def nested(m: Any, x: Tensor) -> Tensor:
    y = m.a(x := x.tanh())
    return m.c(x + (y + m.b(y).relu()))


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x := x.tanh())
    y *= 2
    y += x
    return m.c(y)


def relu_first(m: Any, x: Tensor) -> Tensor:
    """The stream is changed in place, and stays so without the branch."""
    x = m.a(x)
    return m.c(x + m.b(x.relu_()))


def writes(m: Any, x: Tensor) -> Tensor:
    """The branch changes the stream by way of a view."""
    x = m.a(x)
    return m.c(x + m.b(x.view(-1, 6).relu_()).view(x.shape))


def two_of_one(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    return m.a(x) + m.b(x)


def broadcast(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    return x + m.wide(x)


def shared(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    return m.a(x + m.a(x))


def dropped(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    return m.drop(x) * 0.5 + m.drop(m.a(x)).view(x.shape)


def gated(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    return x + m.a(x).relu() * m.b(x).sigmoid()


def read_twice(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y = m.a(x)
    return x + y + y.mean()


# forward -> {addition: (edge, tensors that only the branch reads)}, {addition: a part of the reason}
CASES: dict[str, tuple[Any, dict[str, tuple[str, str]], dict[str, str]]] = {
    "parallel": (parallel, {"/add:0": ("a/linear:0", "a"), "/add:1": ("b/linear:0", "b")}, {}),
    "nested": (nested, {"/add:0": ("/relu:0", "b"), "/add:1": ("/add:0", "ab")}, {}),
    "in place": (in_place, {"/add:0": ("/mul:0", "a")}, {}),
    "relu first": (relu_first, {"/add:0": ("b/linear:0", "b")}, {}),
    "writes": (writes, {}, {"/add:0": "writes to a tensor that others read"}),
    "dropped": (dropped, {"/add:0": ("a/linear:0", "a")}, {}),
    "gated": (gated, {"/add:0": ("/mul:0", "ab")}, {}),
    "read twice": (read_twice, {}, {}),
    "no layer": (lambda m, x: m.c(x + x.relu() + x.mean()), {}, {}),
    "table": (lambda m, x: m.c(m.a(x) + m.table), {}, {}),
    "two of one": (two_of_one, {}, {"/add:0": "the shortcut has layers of its own"}),
    "broadcast": (broadcast, {}, {"/add:0": "the shapes of its terms differ"}),
    "shared": (shared, {}, {"/add:0": "a.weight is used elsewhere too"}),
}  # fmt: skip


def net(name: str) -> tuple[Net, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(CASES[name][0]).eval(), torch.randn(3, 4, 6)


@pytest.mark.parametrize("name", CASES)
def test_the_branches_of(name: str) -> None:
    model, x = net(name)
    found, left = branches(traced(model, (x,)), model)
    assert {b.name: (b.edge, "".join(sorted({t[0] for t in b.tensors}))) for b in found} == CASES[name][1]
    assert left.keys() == CASES[name][2].keys()
    for key, why in CASES[name][2].items():
        assert why in left[key]


BY_HAND: dict[str, dict[str, Callable[[Any, Tensor], Tensor]]] = {
    "parallel": {"/add:0": lambda m, x: m.c((y := x.tanh()) + m.b(m.norm(y)))},
    "nested": {
        "/add:0": lambda m, x: m.c((y := x.tanh()) + m.a(y)), "/add:1": lambda m, x: m.c(x.tanh()),
    },
    "in place": {"/add:0": lambda m, x: m.c(x.tanh())},
    "relu first": {"/add:0": lambda m, x: m.c(m.a(x).relu())},
    "dropped": {"/add:0": lambda m, x: m.c(x) * 0.5},
    "gated": {"/add:0": lambda m, x: m.c(x)},
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_zeros_on_the_edge_leave_the_stream(name: str) -> None:
    model, x = net(name)
    for branch in branches(traced(model, (x,)), model)[0]:
        if branch.name in BY_HAND[name]:
            copy = net(name)[0]
            torch.testing.assert_close(
                with_zeros(copy, {branch.edge})(x), BY_HAND[name][branch.name](model, x)
            )


def test_zeros_may_be_on_other_edges_in_each_call() -> None:
    model, x = net("parallel")
    edges = set[str]()
    zeroed = with_zeros(net("parallel")[0], edges)
    assert torch.equal(zeroed(x), model(x))
    edges.add("a/linear:0")
    torch.testing.assert_close(zeroed(x), BY_HAND["parallel"]["/add:0"](model, x))
    edges.clear()
    assert torch.equal(zeroed(x), model(x))


def test_a_plan_replaces_no_module_that_others_run() -> None:
    """The norm of parallel branches serves both."""
    model, x = net("parallel")
    graph = traced(model, (x,))
    bypass = Bypass(graph, net("parallel")[0], lambda m: m(x))
    for branch in branches(graph, model)[0]:
        plans = list(bypass.plans(branch))
        assert plans
        assert {change.module for plan in plans for change in plan} == {branch.edge.partition("/")[0]}
