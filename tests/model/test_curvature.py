"""Curvature: it predicts changes of the output, and counts the used rows of an embedding."""

import pytest
import torch
from tiny import tiny
from torch import nn

from tersor.core.run import run
from tersor.errors import RefusedError
from tersor.model import curvature
from tersor.model.curvature import curvatures, probe, unseen
from tersor.model.sites import sites_of
from tersor.model.task import Task
from tersor.steps import Rdoq, Slim


def squared_error_task(x: torch.Tensor, outs: int, batch: int = 8) -> Task:
    y = torch.zeros(len(x), outs)
    batches = [(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)]
    return Task(
        "squares", evaluate=batches, calibrate=batches, loss=nn.functional.mse_loss,
        metric=lambda out, target: -(out - target).square().sum(1),
    )  # fmt: skip


def test_for_a_linear_layer_it_is_the_second_moment_of_its_inputs() -> None:
    """The mean of |dW x|^2 is tr(dW E[x x^T] dW^T): F is the identity, up to noise of the random signs."""
    torch.manual_seed(0)
    x, layer = torch.randn(512, 6) * torch.tensor([1, 2, 0.5, 1, 3, 0.1]), nn.Linear(6, 4)
    found = curvatures(layer, squared_error_task(x, 4), list(sites_of(layer)[0].values()), passes=20)[
        "weight"
    ]
    expected = x.T @ x / len(x)
    torch.testing.assert_close(found.columns * found.rows.trace() / 4, expected, rtol=0.1, atol=0.3)
    torch.testing.assert_close(found.rows / found.rows.trace() * 4, torch.eye(4), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "lstm", "mixed"])
def test_it_predicts_changes_of_the_output(name: str) -> None:
    """Random small changes of a weight change the logits as the factors predict, within the approximation."""
    t = tiny(name)
    task = Task("t", evaluate=t.task.evaluate, calibrate=t.task.calibrate, metric=lambda o, y: o.sum(1))
    sites = sites_of(t.model)[0]
    weights = [site for site in sites.values() if site.is_weight]
    found = curvatures(tiny(name).model, task, weights, passes=50)
    assert set(found) == {site.name for site in weights}
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([batch[0] for batch in task.calibrate])
    ratios = []
    for site in weights:
        rows, columns = found[site.name]
        parameter = t.model.get_parameter(site.name)
        before, clean = t.out(t.model), parameter.detach().clone()
        with torch.no_grad():
            y, moved = t.model(x), []
            for _ in range(30):
                change = torch.randn(clean.shape, generator=generator) * 1e-3
                parameter.copy_(clean + change)
                moved.append(float((t.model(x) - y).square().sum(1).mean()))
            parameter.copy_(clean)
        assert torch.equal(before, t.out(t.model))
        traces = [float(m.trace() if m.ndim == 2 else m.sum()) for m in (rows, columns)]
        ratios.append(sum(moved) / len(moved) / (1e-6 * traces[0] * traces[1]))
    assert all(0.4 < ratio < 2.0 for ratio in ratios), ratios


def test_for_logits_it_is_the_fisher_matrix() -> None:
    """E v v^T equals the mean of (p - y)(p - y)^T over labels y drawn from the model's output, in a loop."""
    torch.manual_seed(0)
    logits = torch.tensor([[4.0, 0, 1, -3]], requires_grad=True)
    task = Task("t", evaluate=[(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))], metric="accuracy")
    p, expected = logits.detach()[0].softmax(0), torch.zeros(4, 4)
    for label in range(4):
        error = p - torch.eye(4)[label]
        expected += p[label] * torch.outer(error, error)
    found, sizes = torch.zeros(4, 4), []
    for _ in range(2000):
        (v,) = torch.autograd.grad(probe(logits, task), logits)
        found += v.T @ v / 2000
        sizes.append(float(v.square().sum()))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-3)
    # Drawn labels would give 2 or almost 0: here a standard deviation of 3.6 times the mean.
    spread = torch.tensor(sizes)
    assert float(spread.std()) < float(spread.mean())


def test_unused_rows_have_a_small_weight() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(10, 3), nn.Flatten(1), nn.Linear(6, 2))
    tokens = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    evaluate = [(tokens, torch.zeros(4, dtype=torch.long))]
    task = Task("t", evaluate=evaluate, calibrate=[(tokens[i : i + 1],) for i in range(4)])
    rows, columns = curvatures(table, task, [sites_of(table)[0]["0.weight"]])["0.weight"]
    assert rows.shape == (10,)
    assert columns.shape == (3, 3)
    assert bool((rows > 0).all())
    assert float(rows[4:].max()) < 0.5 * float(rows[:4].min())
    assert float(rows[4:].max()) > 0.05 * float(rows[:4].min())


def test_unseen_rows_together_weigh_as_much_as_rows_seen_once() -> None:
    assert unseen(torch.tensor([5.0, 1, 1, 0, 0, 0, 0])) == 0.5
    assert unseen(torch.tensor([5.0, 1, 1])) == 0
    assert unseen(torch.tensor([1.0] * 5 + [0])) == 1
    assert 0 < unseen(torch.tensor([5.0, 0])) < 0.1


@pytest.mark.parametrize("name", ["mlp", "mixed", "attention"])
def test_wide_weights_have_diagonal_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws give the diagonals of the full factors."""
    t = tiny(name)
    weights = [site for site in sites_of(t.model)[0].values() if site.is_weight]
    full = curvatures(tiny(name).model, t.task, weights)
    monkeypatch.setattr(curvature, "WIDEST", 0)
    narrow = curvatures(tiny(name).model, t.task, weights)
    assert narrow.keys() == full.keys() != set()
    for site, factors in narrow.items():
        for found, whole in zip(factors, full[site], strict=True):
            assert found.ndim == 1
            want = whole.diagonal() if whole.ndim == 2 else whole
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)


def test_a_model_without_gradient_has_none() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.detach().T

    model = Fixed()
    assert curvatures(model, squared_error_task(torch.randn(8, 4), 3), sites_of(model)[0].values()) == {}


class Overwrites(nn.Module):
    """Its code changes a tensor in place that the gradient of the second weight needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).sigmoid()
        y = self.second(hidden)
        hidden.zero_()
        return y


@pytest.mark.parametrize("step", [Rdoq(bits=3, weigh="output"), Slim(keep=0.5, by="curvature")], ids=str)
def test_a_step_that_needs_gradients_is_refused_where_there_are_none(step: Rdoq | Slim) -> None:
    batch = (torch.randn(40, 16), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(RefusedError, match="no gradients pass through the model"):
        run(Overwrites().eval(), step, Task(evaluate=[batch], calibrate=[batch]))


def test_the_random_state_is_left_alone() -> None:
    t = tiny("mlp")
    before = torch.get_rng_state()
    curvatures(t.model, t.task, sites_of(t.model)[0].values())
    assert torch.equal(before, torch.get_rng_state())
