"""Small nets with LSTMs, and what ONNX Runtime's integer LSTM computes, as a slow loop in numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.model.task import Task

Array = np.ndarray[Any, Any]


class Outputs(nn.Module):
    """Two layers in both directions; the last outputs are classified."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 20, 2, batch_first=True, bidirectional=True, **settings)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head(self.cell(x)[0][:, -1])


class States(nn.Module):
    """Steps first, one direction, a first state that depends on the input; the last states are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(6, 20), nn.LSTM(6, 20, 2), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        first = self.first(x.mean(1)).expand(2, -1, -1)
        _, (h, c) = self.cell(x.transpose(0, 1), (first.tanh(), first))
        return self.head(torch.cat([h[-1], c[0]], 1))


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head(self.cell(3 * self.cell(x)[0])[0].mean(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "outputs": Outputs, "no biases": lambda: Outputs(bias=False), "states": States, "shared": Shared,
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net, task_of(torch.randn(16, 7, 6))


def task_of(x: Tensor) -> Task:
    labels = torch.arange(len(x)) % 3
    return Task(train=[(x, labels)], evaluate=[(x, labels)], example=(x[:4],))


def codes_of(values: Array) -> tuple[Array, np.float32]:
    """(codes less their zero point, scale) of the 256 levels between the ends of all values and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(255)
    scale = np.float32(scale) if scale else np.float32(1)
    zero = int(np.rint(np.float32(-low) / scale))
    return np.clip(np.rint(values / scale).astype(np.int64) + zero, 0, 255) - zero, scale


@dataclass(frozen=True)
class Codes:
    """A layer's integers, in torch's order of gates."""

    w: Array  # [4 H, I]
    r: Array  # [4 H, H]
    steps: tuple[Array, Array]  # of w and of r, [4 H]
    bias: Array  # [4 H], both together


def kernel(x: Array, layer: Codes, rows: int = 0) -> Array:
    """One direction of the kernel, x [T, B, I] -> [T, B, H]. `rows`: of the batch that share a range of h, as
    threads deal them out; 0 for all."""

    def sigmoid(values: Array) -> Array:
        return 1 / (1 + np.exp(-values))

    batch, hidden = x.shape[1], layer.r.shape[1]
    h, c = np.zeros((batch, hidden), np.float32), np.zeros((batch, hidden), np.float32)
    read, scale = codes_of(x)
    sums = (read @ layer.w.T.astype(np.int64)).astype(np.float32) * (scale * layer.steps[0])
    found = []
    for step in range(len(x)):
        gates = sums[step].copy()
        for at in range(0, batch, rows or batch):
            part = slice(at, at + (rows or batch))
            read, scale = codes_of(h[part])
            gates[part] += (read @ layer.r.T.astype(np.int64)).astype(np.float32) * (scale * layer.steps[1])
        i, f, g, o = np.split(gates + layer.bias, 4, 1)
        c = (sigmoid(f) * c + sigmoid(i) * np.tanh(g)).astype(np.float32)
        h = (sigmoid(o) * np.tanh(c)).astype(np.float32)
        found.append(h)
    return np.stack(found)
