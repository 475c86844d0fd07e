"""Distillation: a student with a quarter of the teacher's parameters, with and without the teacher.

gain = accuracy with - accuracy without, in points, paired by seed: the same first weights, order of batches
and number of epochs. Hinton, Vinyals, Dean 2015. The whole training set, no augmentation.

Each of the two has its own learning rate, the best of the same candidates: that with the highest accuracy on
10,000 held-out training images, at another seed. Nothing is chosen by the test images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from job import main
from networks import load, parameters, percent, task
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.maths.statistics import paired
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Distill, Finetune

TEACHER = "vgg"
EPOCHS = 20.0
BATCH = 256
RATES = (1e-3, 2e-3, 4e-3)
SHARE, TEMPERATURE = 0.7, 4.0
SEEDS = (0, 1, 2)
SCAN_SEED = 3
HELD_OUT = 10_000


def student(seed: int) -> nn.Module:
    """Three linear layers: LeNet-300-100, a little wider."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(784, 320), nn.ReLU(), nn.Linear(320, 120), nn.ReLU(), nn.Linear(120, 10)
        return nn.Sequential(nn.Flatten(), *layers)


class Remembered(nn.Module):
    """A teacher that computes the output of each image once and then caches it: epochs repeat the images."""

    def __init__(self, teacher: nn.Module, images: Tensor) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        # Integer products wrap around and have the same sum in any order: a key is exact.
        self.factors = torch.randint(-(2**62), 2**62, (images[0].numel(),), generator=drawn)
        with torch.no_grad():
            answers = torch.cat([teacher(batch) for batch in images.split(256)])  # [N, K]
        self.keys, order = torch.cat([self.key(batch) for batch in images.split(256)]).sort()
        self.answers = answers[order]

    def key(self, images: Tensor) -> Tensor:
        """One integer an image [B], of the bits of its pixels."""
        return (images.flatten(1).contiguous().view(torch.int32).long() * self.factors).sum(1)

    def forward(self, images: Tensor) -> Tensor:
        key = self.key(images)
        place = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        if not torch.equal(self.keys[place], key):
            raise ValueError("the teacher is asked about an image that it has not seen")
        return self.answers[place]


def measure(name: str) -> Iterator[Row]:
    on, teacher = task(batch=BATCH), load(TEACHER).to(memory_format=torch.channels_last)
    share = 100 * parameters(student(0)) / parameters(teacher)
    yield row(name, "teacher, accuracy", percent(on.scores(teacher)), "%", note=TEACHER)
    yield row(name, "student of the teacher's parameters", round(share, 2), "%", "<= 25")
    images, labels = on.train.dataset.tensors
    remembered = Remembered(teacher, images)
    arms = {
        "alone": lambda lr: Finetune(epochs=EPOCHS, lr=lr),
        "taught": lambda lr: Distill(
            epochs=EPOCHS, lr=lr, teacher=remembered, teacher_weight=SHARE, temperature=TEMPERATURE
        ),
    }
    apart, rates = held_out(on, images, labels), {}
    for arm, step in arms.items():
        found = {}
        for lr in RATES:
            found[lr] = trained(SCAN_SEED, apart, step(lr))
            yield row(name, f"{arm}, held out, lr {lr:g}", found[lr], "%")
        rates[arm] = max(found, key=lambda lr: found[lr])
    scores: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in SEEDS:
        for arm, step in arms.items():
            scores[arm].append(trained(seed, on, step(rates[arm])))
            yield row(name, f"{arm}, seed {seed}", scores[arm][-1], "%", note=f"lr {rates[arm]:g}")
    mean, low, high, _ = paired(scores["alone"], scores["taught"])
    note = f"mean of {len(SEEDS)} seeds, 95 % t-interval {low:+.2f} to {high:+.2f}; {EPOCHS:g} epochs"
    yield row(name, "gain by the teacher", round(mean, 2), "points", ">= 0.5", note=note)


def held_out(on: Task, images: Tensor, labels: Tensor) -> Task:
    """The same task on training images only: some for evaluation, the others for training."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SCAN_SEED))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return replace(
        on,
        evaluate=TensorBatches(images[test], labels[test], batch=BATCH),
        train=TensorBatches(images[train], labels[train], batch=BATCH, shuffle=True),
        fingerprint=None,
    )


def trained(seed: int, on: Task, step: Finetune) -> float:
    """The student's accuracy after one step of the recipe, from the first weights of this seed."""
    return percent(on.scores(run(student(seed), step, on, seed=seed).model()))


def row(name: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("distillation", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, ("lenet-320-120",)))
