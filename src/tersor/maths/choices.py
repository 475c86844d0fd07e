"""Choices: one way to store each layer, from the numbers that each costs and the damage that it does alone.

min sum of damage[l][c[l]]    with sum of cost[l][c[l]] <= budget, c[l] one of the choices of layer l
Damages add up to first order, because errors of different layers are hardly correlated (Zhou 2018; HAWQ-V2,
Dong 2020). For a budget this is a multiple-choice knapsack, which `allocation.py` solves. For a limit on
something that can only be measured, `ladder` lists the choices that are best for some price of a cost
(Shoham, Gersho 1988), from the cheapest upwards. Costs are bits of a weight times weights, or numbers stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tersor.errors import SettingError
from tersor.maths.allocation import Cost, Term, Width, allocate

Choice = tuple[int, ...]  # of each layer, an index into its choices


def within(costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: float) -> Choice:
    """The choice with the least damage whose costs are within the budget.

    `costs`: of each choice of each layer, ascending. `damages`: of each choice. SettingError if even the
    cheapest choices are beyond the budget.
    """
    whole = Cost(Term(1.0, (Width(units=((layer, 1.0),)),)) for layer in range(len(costs)))
    falling = [np.minimum.accumulate(each).tolist() for each in damages]
    found = allocate(costs, falling, whole, budget)
    if not found.fits:
        least = sum(each[0] for each in costs)
        raise SettingError(f"the budget is {budget:g}, and the least possible is {least:g}")
    chosen = [list(each).index(cost) for each, cost in zip(costs, found.counts, strict=True)]
    # Where a higher cost does more damage, the cheaper one is meant that the falling damage comes from.
    return tuple(int(np.argmin(each[: at + 1])) for each, at in zip(damages, chosen, strict=True))


def ladder(costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]]) -> list[Choice]:
    """Choices from the cheapest of all layers to the dearest. Each rung raises one layer: the one, and as
    far, as undoes the most damage for each cost that it adds."""
    at = [0] * len(costs)
    rungs = [tuple(at)]
    while True:
        steps = [
            ((damages[layer][at[layer]] - damages[layer][up]) / (each[up] - each[at[layer]]), layer, up)
            for layer, each in enumerate(costs)
            for up in range(at[layer] + 1, len(each))
        ]
        if not steps:
            return rungs
        _, layer, up = max(steps, key=lambda step: (step[0], -step[2]))
        at[layer] = up
        rungs.append(tuple(at))
