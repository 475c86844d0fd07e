"""Bit allocation: how many bits each layer gets, from the damage that each choice does alone.

min sum of damage[l](b[l])    with sum of count[l] * b[l] <= budget, b[l] one of the bits that are allowed
Damages add up to first order, because errors of different layers are hardly correlated (Zhou 2018; HAWQ-V2,
Dong 2020). For a budget this is a multiple-choice knapsack, which `allocation.py` solves. For a limit on
something that can only be measured, `ladder` lists the allocations that are best for some price of a bit
(Shoham, Gersho 1988), from the fewest bits upwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tersor.errors import SettingError
from tersor.maths.allocation import Cost, Term, Width, allocate

Choice = tuple[int, ...]  # of each layer, an index into its bits


def within(
    counts: Sequence[int], bits: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: float
) -> Choice:
    """The choice with the least damage whose bits are within the budget.

    `counts`: weights of each layer. `bits`: the choices of each layer, bits a weight, ascending. `damages`:
    of each choice. SettingError if even the fewest bits are beyond the budget.
    """
    cost = Cost(Term(float(n), (Width(units=((layer, 1.0),)),)) for layer, n in enumerate(counts))
    falling = [np.minimum.accumulate(each).tolist() for each in damages]
    found = allocate(bits, falling, cost, budget)
    if not found.fits:
        least = sum(n * each[0] for n, each in zip(counts, bits, strict=True))
        raise SettingError(f"bits: the budget is {budget:g} bits, and the fewest allowed are {least:g}")
    chosen = [list(each).index(b) for each, b in zip(bits, found.counts, strict=True)]
    # Where more bits do more damage, the ones meant are fewer: those that the falling damage comes from.
    return tuple(int(np.argmin(each[: at + 1])) for each, at in zip(damages, chosen, strict=True))


def ladder(
    counts: Sequence[int], bits: Sequence[Sequence[int]], damages: Sequence[Sequence[float]]
) -> list[Choice]:
    """Choices from the fewest bits of all layers to the most. Each rung raises one layer: the one, and as
    far, as undoes the most damage for each bit that it adds."""
    at = [0] * len(counts)
    rungs = [tuple(at)]
    while True:
        steps = [
            ((damages[layer][at[layer]] - damages[layer][up]) / (n * (each[up] - each[at[layer]])), layer, up)
            for layer, (n, each) in enumerate(zip(counts, bits, strict=True))
            for up in range(at[layer] + 1, len(each))
        ]
        if not steps:
            return rungs
        _, layer, up = max(steps, key=lambda step: (step[0], -step[2]))
        at[layer] = up
        rungs.append(tuple(at))
