"""Tiny models and tasks that every step must cope with: seconds for hundreds of runs, and no shape is kind.

mlp        widths 7, 1, 7: a layer of one neuron, a row of one weight
conv       batch norm, a skip, dropout (draws random numbers in training)
attention  tied embeddings, an own qkv and nn.MultiheadAttention, a mask of -inf as a buffer, a bare parameter
lstm       two directions, so that the names carry suffixes
mixed      transposed, grouped, depthwise, dilated and 1-D convolutions
Data is random with labels from a fixed linear rule, so that training has something to learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.model.loader import TensorBatches
from tersor.model.task import Task

BATCH, TRAIN, EVALUATE = 8, 16, 20
CLASSES = 3
TOKENS, LENGTH = 11, 6


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 7), nn.ReLU(),
            nn.Linear(7, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # [B, 5]
        return self.layers(x)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.block, self.norm1 = nn.Conv2d(7, 7, 3, padding="same"), nn.BatchNorm2d(7)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6]
        x = self.norm0(self.stem(x)).relu()
        x = (x + self.norm1(self.block(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Attention(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8)
        self.place = nn.Parameter(torch.randn(LENGTH, 8) * 0.1)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.multi = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, K]
        x = self.embed(tokens) + self.place
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 2))
        seen = (q @ k.transpose(2, 3) / 2 + self.mask).softmax(3) @ v  # [B, 2, T, 4]
        x = x + seen.transpose(1, 2).flatten(2)
        x = x + self.multi(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 5, batch_first=True, bidirectional=True), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 3]
        return self.head(self.cell(x)[0].mean(1))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, dilation=2, padding=2)
        self.point = nn.Conv2d(6, 7, 1)
        self.line = nn.Conv1d(7, 5, 3, padding=1)
        self.back = nn.ConvTranspose1d(5, 3, 2)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 4, 4]
        x = self.point(self.depthwise(self.grouped(self.up(x).relu()).relu())).relu()
        return self.head(self.back(self.line(x.flatten(2)).relu()).mean(2))


def vectors(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, generator: torch.randn(count, *shape, generator=generator)


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(TOKENS, (count, LENGTH), generator=generator)


# (model, what draws its inputs, number of classes)
Models = dict[str, tuple[type[nn.Module], Callable[[int, torch.Generator], Tensor], int]]
MODELS: Models = {
    "mlp": (Mlp, vectors(5), CLASSES),
    "conv": (Conv, vectors(1, 6, 6), CLASSES),
    "attention": (Attention, tokens, TOKENS),
    "lstm": (Lstm, vectors(4, 3), CLASSES),
    "mixed": (Mixed, vectors(2, 4, 4), CLASSES),
}


@dataclass(frozen=True)
class Tiny:
    """A model in eval mode, its task, and a batch to look at its outputs."""

    name: str
    model: nn.Module
    task: Task
    x: Tensor

    def out(self, model: nn.Module | None = None) -> Tensor:
        """What a model answers to `x`."""
        with torch.no_grad():
            return (self.model if model is None else model).eval()(self.x)


def tiny(name: str, seed: int = 0, models: Models | None = None) -> Tiny:
    """A fresh tiny model by name, the same each time."""
    kind, draw, classes = (models or MODELS)[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # without devices: 5 ms less
        model = kind().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    count = TRAIN + EVALUATE
    x = draw(count, generator)
    rule = torch.randn(x[0].numel(), classes, generator=generator)
    y = (x.float().flatten(1) @ rule).argmax(1)
    return Tiny(name, model, task_of(name, x, y), x[:4])


def task_of(name: str, x: Tensor, y: Tensor) -> Task:
    """16 samples to train in shuffled batches of 8, 20 to evaluate in batches of 8, 8 and 4. Two models have
    a DataLoader, the others batches in memory: both must do."""
    train: Any = (
        DataLoader(TensorDataset(x[:TRAIN], y[:TRAIN]), batch_size=BATCH, shuffle=True)
        if name in ("conv", "lstm")
        else TensorBatches(x[:TRAIN], y[:TRAIN], batch=BATCH, shuffle=True)
    )
    return Task(
        f"tiny {name}",
        evaluate=TensorBatches(x[TRAIN:], y[TRAIN:], batch=BATCH),
        calibrate=[(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, TRAIN, BATCH)],
        train=train,
    )


# Settings that train where defaults do not, and are cheap: one pass of two batches. A step that cannot train
# has none.
TRAINED: dict[str, dict[str, Any]] = {
    "prune": {"epochs": 1, "ramp": 0.5, "keep": 0.3},
    "quantize": {"epochs": 1, "bits": 3, "symmetric": False, "per": "group", "group": 4, "lr": 0.01},
    "cluster": {"epochs": 1, "entries": 5, "optimizer": "sgd", "lr": 0.01},
    "factorize": {"epochs": 1, "rank": 1, "teacher_weight": 0.5},
    "finetune": {"epochs": 1, "lr": 0.01},
    "distill": {"epochs": 1, "lr": 0.01, "schedule": "onecycle"},
    "slim": {"epochs": 1, "lr": 0.01, "rounds": 2, "by": "l2", "unmet": "nearest"},
    "shorten": {"epochs": 1, "lr": 0.01, "keep": 0.5, "of": "branches", "unmet": "nearest"},
    "penalize": {"epochs": 1, "lr": 0.01, "bits": 2.0, "per": "channel", "teacher_weight": 0.0},
}


# Settings without which a step refuses some of the tiny models: they have too few units for a budget.
SMALL: dict[str, dict[str, Any]] = {"slim": {"unmet": "nearest"}, "shorten": {"unmet": "nearest"}}
