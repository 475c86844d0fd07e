"""Runs in several threads of one process: each gives what it gives alone."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import TRAINED, Tiny, tiny

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.steps import STEPS


def trained(net: Tiny, seed: int) -> str:
    """The digest of a network with dropout after a training on shuffled batches."""
    torch.set_num_threads(1)
    steps = [STEPS[name](**TRAINED[name]) for name in ("prune", "finetune")]
    return run(net.model, Recipe(tuple(steps), seed=seed), net.task).digest


def test_trainings_in_threads_do_not_disturb_each_other(caplog: pytest.LogCaptureFixture) -> None:
    """They shared the random state of torch, numpy and random, which belongs to the process."""
    seeds = (0, 1, 0)
    alone = [trained(tiny("conv", seed), seed) for seed in seeds]
    nets = [tiny("conv", seed) for seed in seeds]  # here: their weights are drawn from the random state too
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "tersor"), ThreadPoolExecutor(3) as pool:
        together = list(pool.map(trained, nets, seeds))
    assert together == alone
    assert alone[0] == alone[2] != alone[1]
    assert torch.equal(before, torch.get_rng_state())
    assert any("another thread" in record.getMessage() for record in caplog.records)
