"""Solved: a network with statistics and biases at random, and a task that it solves by definition."""

from collections.abc import Callable

import torch
from torch import nn

from tersor.model.task import Task


def solved(
    name: str, kind: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, *, scales: bool = False
) -> tuple[nn.Module, Task]:
    """Three batches of random inputs of this shape, labelled by the network itself. `scales`: the norms'
    factors are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
        x = torch.randn(3 * batch, *shape)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.normal_(0, 0.3)
                if scales:
                    module.weight.data.uniform_(0.5, 1.5)
                module.momentum = None  # the statistics of the data
        with torch.no_grad():
            model.train()(x)
        model.eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    return model, Task(name, evaluate=batches, calibrate=batches, train=batches)
