"""Damping: the degrees of freedom that it leaves, counted by the fit itself, and what it is for."""

from __future__ import annotations

import pytest
import torch

from tersor.maths.damping import DAMP, SAMPLES, damping
from tersor.maths.unit_removal import Reader, removal


def moment_of(samples: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(3, 0.1, inputs, dtype=torch.float64)
    return x.T @ x / samples


@pytest.mark.parametrize(("samples", "inputs"), [(10, 40), (40, 40), (100, 40)])
def test_few_samples_leave_a_quarter_as_many_degrees_of_freedom(samples: int, inputs: int) -> None:
    h = moment_of(samples, inputs)
    found = damping(h, samples)
    smoother = torch.linalg.solve(h + found * torch.eye(inputs, dtype=h.dtype), h)
    assert float(smoother.trace()) == pytest.approx(samples / SAMPLES, rel=1e-6)


def test_many_samples_and_few_directions_are_damped_as_little_as_possible() -> None:
    h = moment_of(1000, 40)
    assert damping(h, 1000) == pytest.approx(DAMP * float(h.diagonal().mean()))
    one = torch.outer(*[torch.linspace(1, 2, 40, dtype=torch.float64)] * 2)  # a single direction
    assert damping(one, 10) == pytest.approx(DAMP * float(one.diagonal().mean()))
    assert damping(torch.zeros(4, 4), 1) == pytest.approx(1e-12)


def test_what_few_samples_cannot_show_is_not_removed_for_nothing() -> None:
    """Of 30 samples, any 20 of 50 inputs are a function of the others. On new samples they are not: what is
    removed for its small weights does less damage than what seemed to be redundant."""
    generator = torch.Generator().manual_seed(1)
    inputs, samples = 50, 30
    weight = torch.randn(5, inputs, generator=generator) * torch.linspace(1, 0.05, inputs)
    x = torch.randn(samples, inputs, generator=generator)
    columns = torch.arange(inputs)[:, None]
    h, true = x.T @ x / samples, torch.eye(inputs)

    def damage(count: int) -> float:
        order = removal([Reader(weight, h, columns, count)], inputs).order[:20]
        gone = weight.double().clone()
        gone[:, [at for at in range(inputs) if at not in order.tolist()]] = 0
        return float((gone @ true.double() * gone).sum())

    assert damage(samples) < 0.8 * damage(10**9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_for_the_caller_to_refuse(value: float) -> None:
    assert not damping(torch.full((8, 8), value), 4) < float("inf")
