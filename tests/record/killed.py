"""Killed: a run that kills itself. `python killed.py FOLDER N` journals RECIPE in FOLDER and ends with
SIGKILL in the N-th training step. test_journal.py resumes it."""

import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import Tiny, tiny

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.steps import Entropy, Finetune, Prune, Quantize

# Batch norm, dropout and shuffled batches, so that buffers, random state and optimizer moments matter.
EPOCHS, BATCHES = 4, 2
RECIPE = Recipe(
    (
        Quantize(bits=4),
        Prune(keep=0.4, epochs=EPOCHS, ramp=0.5, lr=0.01),
        Finetune(epochs=EPOCHS, lr=0.01),
        Entropy(coder="huffman"),
    ),
    seed=5,
)


def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
    """Inputs with noise from Python's and numpy's generators, as in users' augmentations."""
    noise = random.random() + np.random.rand() if model.training else 0  # noqa: NPY002
    return model(batch[0] * (1 + 0.1 * noise))


class Dying:
    """Calls the model, and kills the process in the `at`-th training step."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.seen += model.training
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return noisy(model, batch)


def dying(given: Tiny, at: int) -> Tiny:
    """The same task with a feed that may kill it in the `at`-th step. The feed also runs once in the check
    of the task and once before each training."""
    at += (2 + (at > EPOCHS * BATCHES)) if at > 0 else 0
    return replace(given, task=replace(given.task, feed=Dying(at)))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    t = dying(tiny("conv"), int(sys.argv[2]))
    run(t.model, RECIPE, t.task, journal=sys.argv[1])
    sys.exit("it was to be killed and was not")
