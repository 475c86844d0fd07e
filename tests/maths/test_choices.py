"""Choices: as good as brute force over all assignments, and rungs that are best for their cost."""

import itertools

import numpy as np
import pytest

from tersor.errors import SettingError
from tersor.maths.choices import Choice, ladder, within

BITS = [[2, 4, 8]] * 5


def problem(seed: int) -> tuple[list[int], list[list[float]]]:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 60, 5).tolist()
    first = random.lognormal(0, 2, 5)
    return counts, [[a * 4.0**-b * random.uniform(0.5, 2) for b in (2, 4, 8)] for a in first]


def costs(counts: list[int]) -> list[list[int]]:
    return [[n * bits for bits in each] for n, each in zip(counts, BITS, strict=True)]


def size(counts: list[int], choice: Choice) -> int:
    return sum(n * BITS[0][at] for n, at in zip(counts, choice, strict=True))


def total(damages: list[list[float]], choice: Choice) -> float:
    return sum(each[at] for each, at in zip(damages, choice, strict=True))


def best_of_all(counts: list[int], damages: list[list[float]]) -> None:
    every = list(itertools.product(range(3), repeat=5))
    for mean in (2.0, 3.3, 5.0, 8.0):
        budget = mean * sum(counts)
        found = within(costs(counts), damages, budget)
        assert size(counts, found) <= budget
        best = min(total(damages, c) for c in every if size(counts, c) <= budget)
        assert total(damages, found) <= 1.001 * best


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_assignments(seed: int) -> None:
    counts, damages = problem(seed)
    best_of_all(counts, damages)


@pytest.mark.parametrize("seed", range(12))
def test_more_bits_may_do_more_damage(seed: int) -> None:
    """Measured damages are not always falling: fewer bits are taken where they do less."""
    counts, damages = problem(seed)
    damages = [each[::-1] if layer % 2 else each for layer, each in enumerate(damages)]
    best_of_all(counts, damages)


@pytest.mark.parametrize("seed", range(12))
def test_each_rung_is_the_best_for_its_bits(seed: int) -> None:
    counts, damages = problem(seed)
    rungs = ladder(costs(counts), damages)
    assert (rungs[0], rungs[-1]) == ((0,) * 5, (2,) * 5)
    every = list(itertools.product(range(3), repeat=5))
    for rung in rungs:
        mine = size(counts, rung)
        assert total(damages, rung) <= 1.001 * min(
            total(damages, c) for c in every if size(counts, c) <= mine
        )


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    counts, damages = problem(0)
    with pytest.raises(SettingError, match="least possible"):
        within(costs(counts), damages, 1.9 * sum(counts))
