"""Price search: find the price of a bit (the Lagrange multiplier lambda) that meets a target.

least(bits, budget)      the least price whose bits are within the budget; bits fall by about half a bit a
                         weight when the price doubles
largest(loss, limit)     the largest price whose loss is within the limit, by a power law through the losses
                         around it
A loss that counts samples is noisy: the last bit of a sum changes some codes, and then some answers. The best
of the prices tried would be the luckiest one. The power law averages the noise of all tries near the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from tersor.errors import RefusedError

TRIES = 16
PATIENCE = 4  # tries on one side of a budget, after which steps double
OCTAVES = 3.0  # first step of a search for a limit
FARTHEST = 1000.0  # largest distance of a price from 1, in octaves
CLOSE = 0.12  # octaves between the bounds at which a limit is found without a power law
NEAR = 1.0  # octaves between the bounds within which the power law is fitted
AROUND = (-0.75, -0.45, -0.15, 0.15, 0.45, 0.75)  # octaves from the limit at which a power law is fitted
LEAST, FLATTEST = 3, 0.1  # tries, and slope, of a power law


def power(at: float) -> float:
    """The price with this logarithm, within the range of floats."""
    return 2.0 ** max(-FARTHEST, min(FARTHEST, at))


def least(
    measure: Callable[[float], float], budget: float, start: float, *, slope: float, near: float, who: str
) -> float:
    """The least price found with measure(price) <= budget; stops within a fraction `near` of the budget.

    `slope`: about how much the measure falls per octave. RefusedError if no price is enough.
    """
    over: tuple[float, float] | None = None  # log price and measure, above the budget and within it
    under: tuple[float, float] | None = None
    at = math.log2(start)
    found = math.inf
    for turn in range(TRIES):
        found = measure(power(at))
        if found <= budget:
            under = (at, found)
            if found >= (1 - near) * budget:
                break
        else:
            over = (at, found)
        if over and under:
            share = (over[1] - budget * (1 - near / 2)) / max(over[1] - under[1], 1e-9)
            at = over[0] + (under[0] - over[0]) * min(0.9, max(0.1, share))
            if abs(under[0] - over[0]) < 1e-3:
                break
        else:
            step = (found - budget) / slope
            # If all weights are alike, the bits do not fall for many octaves, and then fall at once.
            least_step = 0.05 * 2.0 ** max(0, turn - PATIENCE)
            at += min(12.0, max(-12.0, step + math.copysign(least_step, step)))
    if under is None:
        raise RefusedError(
            f"{who}: the budget for these weights is {budget / 8:.0f} bytes, and the fewest found are "
            f"{found / 8:.0f}. Allow more, or prune first."
        )
    return power(under[0])


def largest(
    measure: Callable[[float], float], limit: float, start: float, *, who: str, unit: str = "points"
) -> float:
    """The largest price with measure(price) <= limit, by a power law fitted to some ten tries around it.

    If the tries follow none (a loss of 0 that rises at once), the largest price found to be within the limit.
    RefusedError if no price is.
    """
    tried: dict[float, float] = {}  # log2 of the price: the measure

    def sought(at: float) -> bool:
        tried[at] = measure(power(at))
        return tried[at] <= limit

    good, bad = bracket(sought, math.log2(start), NEAR)
    if good is None:
        raise RefusedError(
            f"{who}: max_drop={limit:g} is not met even at the lowest price of a bit: the loss is still "
            f"{tried[min(tried)]:g}{unit and f' {unit}'}. Allow more, or leave out sensitive weights with "
            f"where='!NAME'."
        )
    if bad is None:
        return power(good)
    middle = crossing(tried, limit, (good + bad) / 2)
    middle = (good + bad) / 2 if middle is None else middle
    for offset in AROUND:
        sought(middle + offset)
    found = crossing(tried, limit, middle)
    if found is not None:
        return power(found)
    good, bad = bracket(sought, good, CLOSE, (good, bad))
    return power(good if good is not None else min(tried))


def bracket(
    within: Callable[[float], bool], at: float, near: float,
    known: tuple[float | None, float | None] = (None, None),
) -> tuple[float | None, float | None]:  # fmt: skip
    """Two log prices at most `near` apart, the lower one within the limit and the upper one not; None where
    none was found."""
    good, bad = known
    for _ in range(TRIES):
        if good is not None and bad is not None:
            if bad - good < near:
                break
            at = (good + bad) / 2
        if within(at):
            good = at
        else:
            bad = at
        at += OCTAVES if bad is None else -OCTAVES
    return good, bad


def crossing(tried: Mapping[float, float], limit: float, middle: float) -> float | None:
    """The log price at which log loss = a + b * log price reaches the limit, by least squares over the tries
    near `middle`. None if these tries do not follow such a law."""
    reach = AROUND[-1] + NEAR / 2
    near = {at: loss for at, loss in tried.items() if abs(at - middle) <= reach and loss > 0}
    if len(near) < LEAST or not min(near.values()) <= limit < max(near.values()):
        return None
    at, loss = np.array(list(near)), np.log2(list(near.values()))
    slope, offset = np.polyfit(at, loss, 1)
    found = float((math.log2(limit) - offset) / max(slope, 1e-9))
    return found if slope >= FLATTEST and abs(found - middle) <= reach else None
