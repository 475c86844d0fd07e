"""Steps use the axes of roles: one matrix as [O, I] and as [I, O] is compressed with the same error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import start
from tersor.core.view import View
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.steps import Cluster, Factorize, Prune, Quantize, Rdoq


class Linears(nn.Module):
    def __init__(self, w: Tensor, v: Tensor):
        super().__init__()
        self.first, self.second = nn.Linear(*w.shape[::-1]), nn.Linear(*v.shape[::-1])
        self.first.weight, self.second.weight = nn.Parameter(w), nn.Parameter(v)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Turned(nn.Module):
    """Like transformers' Conv1D: weight [I, O]."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(w.T.contiguous()), nn.Parameter(torch.zeros(len(w)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Conv1Ds(nn.Module):
    def __init__(self, w: Tensor, v: Tensor):
        super().__init__()
        self.first, self.second = Turned(w), Turned(v)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def pair() -> tuple[nn.Module, nn.Module, Task]:
    """The same network twice, with rows of very different sizes."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(20, 12, generator=random) * torch.logspace(-2, 1, 20)[:, None]
    v = torch.randn(5, 20, generator=random) * torch.logspace(-1, 1, 5)[:, None]
    x = torch.randn(64, 12, generator=random) @ torch.randn(12, 12, generator=random)
    batches = [(x, torch.arange(64) % 5)]
    return Linears(w.clone(), v.clone()), Conv1Ds(w, v), Task("pair", evaluate=batches, calibrate=batches)


STEPS: dict[str, Any] = {
    "quantize": Quantize(bits=3),
    "quantize in groups": Quantize(bits=3, per="group", group=4),
    "ternary": Quantize(scheme="ternary"),
    "cluster by row": Cluster(entries=4, per="channel"),
    "prune by row": Prune(keep=0.4, per="channel", correct=False),
    "2:4": Prune(pattern="2:4", correct=False),
    "rdoq": Rdoq(bits=3.0, weigh="none", per="channel", vectors=False),
    "rdoq by outputs": Rdoq(bits=3.0, vectors=False),
    "factorize": Factorize(rank=2, whiten=False),
    "factorize, whitened": Factorize(rank=2),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_matrix_as_inputs_by_outputs_loses_no_more(name: str) -> None:
    plain, turned, task = pair()
    one, two = run(plain, STEPS[name], task), run(turned, STEPS[name], task)
    for site in ("first.weight", "second.weight"):
        a, b = one.forms[site].decode(), two.forms[site].decode().T
        given = plain.state_dict()[site]
        first, second = (((x - given).norm(dim=1) / given.norm(dim=1)).square().mean() for x in (a, b))
        assert float(first) > 0
        assert float(second) <= 1.5 * float(first)
        if "rdoq" not in name:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_a_product_of_a_turned_matrix_is_rounded_by_its_own_sides() -> None:
    """A square matrix: the curvature of outputs also fits the wrong factor, without an error."""
    random = torch.Generator().manual_seed(0)
    w, v = torch.randn(12, 12, generator=random), torch.randn(5, 12, generator=random)
    x = torch.randn(64, 12, generator=random) * torch.logspace(-2, 1, 12)
    batches = [(x, torch.arange(64) % 5)]
    task = Task("square", evaluate=batches, calibrate=batches)
    plain = Linears(w.clone(), v.clone())
    steps = [Factorize(rank=5, whiten=False), Rdoq(bits=3.0, vectors=False)]
    lost = []
    for model in (plain, Conv1Ds(w, v)):
        with torch.no_grad():
            before = run(model, steps[0], task).model()(x)
            lost.append(float((run(model, steps, task).model()(x) - before).norm()))
    assert lost[1] <= 1.5 * lost[0]


def test_second_moments_of_a_turned_matrix_are_seen() -> None:
    plain, turned, task = pair()
    one, two = (View(start(m, task), task, "look", "0", 0, Observer()) for m in (plain, turned))
    for site in ("first.weight", "second.weight"):
        torch.testing.assert_close(two.gram(two.sites[site]), one.gram(one.sites[site]), rtol=1e-4, atol=1e-3)


class Twisted(Turned):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.weight + self.bias


def test_second_moments_of_other_products_are_not_guessed() -> None:
    _, turned, task = pair()
    turned.first = Twisted(torch.randn(20, 12))
    view = View(start(turned, task), task, "look", "0", 0, Observer())
    assert view.gram(view.sites["first.weight"]) is None
    assert view.gram(view.sites["second.weight"]) is not None


class Experts(nn.Module):
    """[E, I, O]: one matrix [I, O] for each of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 3) * torch.logspace(-2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:  # [B, 8]
        return torch.bmm(x.expand(2, *x.shape), self.experts).mean(0)


def test_experts_have_a_grid_for_each_output_and_patterns_along_their_inputs() -> None:
    x = torch.randn(6, 8)
    task = Task("experts", evaluate=[(x, torch.arange(6) % 3)])
    torch.manual_seed(0)
    model = Experts()
    result = run(model, Quantize(bits=4), task)
    assert (result.sites["experts"].axis, result.sites["experts"].contracted) == (2, 1)
    error = (result.forms["experts"].decode() - model.experts).abs().amax((0, 1))
    assert (error <= model.experts.abs().amax((0, 1)) / 14 + 1e-6).all()  # half a step of each output's own
    mask = run(model, Prune(pattern="2:4", correct=False), task).forms["experts"].keep.decode()
    assert (mask.reshape(2, 2, 4, 3).sum(2) == 2).all()
