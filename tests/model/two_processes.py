"""A compression on two CPU processes: torchrun --nproc-per-node 2 two_processes.py FOLDER.

Each process writes what it ended with to FOLDER/RANK.json; test_two_processes.py compares.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.run import run
from tersor.core.state import State
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Distill, Finetune, Prune, Quantize

FEATURES, CLASSES, TRAIN, EVALUATE, BATCH = 12, 4, 512, 400, 16


class Net(nn.Module):
    """A model with batch norm, whose running statistics differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.Linear(24, CLASSES)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def task(kind: str) -> Task:
    """The same data as a DataLoader, which Accelerate shards, or as a list, of which each process takes every
    second batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TRAIN + EVALUATE, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    data = TensorDataset(x[:TRAIN], y[:TRAIN])
    train = {
        "loader": DataLoader(data, batch_size=BATCH, shuffle=True),
        "list": [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, TRAIN, BATCH)],
    }[kind]
    return Task(evaluate=TensorBatches(x[TRAIN:], y[TRAIN:], batch=200), train=train)


def compress(kind: str, journal: Path | None, resume: bool = False) -> State:
    """Train, prune in training, quantize and train: their hooks run in every process. Then distill from a
    wider teacher: the feature map is trained in both."""
    torch.manual_seed(5)
    wide = nn.Sequential(nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, CLASSES))
    steps = [
        Finetune(epochs=6, lr=0.02),
        Prune(keep=0.5, epochs=3, ramp=0.5, lr=0.01),
        Quantize(bits=4, epochs=2, lr=0.002),
        Distill(
            epochs=1,
            lr=0.001,
            teacher_weight=0.0,
            teacher=wide,
            features="first=0",
            feature_weight=0.1,
            max_grad_norm=1.0,
            lr_of="last.*=0.5",
        ),  # fmt: skip
    ]
    return run(model(), steps, task(kind), seed=2, journal=journal, resume=resume)


def facts(kind: str, result: State) -> dict[str, object]:
    return {
        "forms": {name: form.digest for name, form in result.forms.items()},
        "ledger": result.ledger.digest,
        "accuracy": float(task(kind).scores(result.model()).mean()),
        "steps": [entry.data["steps"] for entry in result.ledger.notes("trained")],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    found = {
        kind: facts(kind, compress(kind, folder / f"journal-{kind}" if kind == "loader" else None))
        for kind in ("loader", "list")
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
