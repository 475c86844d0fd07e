"""Slim with fewer calibration samples than a layer has inputs: neither the choice nor the refit fits them."""

from __future__ import annotations

import torch
from torch import nn

import tersor
from tersor.model.task import Task


def test_a_refit_to_few_samples_helps_on_others() -> None:
    """Fifty samples for the 48 units that stay. Without damping both were worse than without a refit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 12))
    data = [(x, model(x).detach()) for x in torch.randn(2, 50, 24)]
    task = Task(
        "teacher", calibrate=data[:1], evaluate=data[1:], metric=lambda out, y: -(out - y).square().mean(1)
    )
    new = torch.randn(2000, 24)

    def error(**settings: object) -> float:
        small = tersor.run(model, tersor.Slim(keep=0.5, of="parameters", **settings), task).model()
        with torch.no_grad():
            return float((small(new) - model(new)).square().mean())

    assert error() < 0.7 * error(correct=False)
    assert error(by="random") < 0.7 * error(by="random", correct=False)
