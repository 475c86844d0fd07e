"""A user's own model and data, as a file: `net` is the trained model, `task` says what it is for.

The data are two interleaved spirals. A real `net` would load its weights from a file.
"""

import math

import torch
from torch import Tensor, nn

import tersor


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points x [N, 2] on one of two arms y [N]."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=random)
    turn = torch.rand(count, generator=random).sqrt() * 2.5 * math.pi
    arm = torch.stack([turn.cos(), turn.sin()], 1) * turn[:, None] * (2 * y[:, None] - 1) / 8
    return arm + 0.03 * torch.randn(count, 2, generator=random), y


def net() -> nn.Module:
    """A small classifier, trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = spirals(512, seed=1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def task() -> tersor.Task:
    train, test = (tersor.TensorBatches(*spirals(n, seed), batch=64) for n, seed in ((512, 1), (400, 2)))
    return tersor.Task("spirals", train=train, evaluate=test)
