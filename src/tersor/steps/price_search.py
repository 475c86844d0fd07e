"""Price search: find the price of a bit (the Lagrange multiplier lambda) that meets a target.

least(bits, budget)      the least price whose bits are within the budget; bits fall by about half a bit a
                         weight when the price doubles
largest(loss, limit)     the largest price whose loss is within the limit, by bisection of its logarithm and a
                         few tries beyond the result
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tersor.errors import RefusedError

TRIES = 16
PATIENCE = 4  # tries on one side of a budget, after which steps double
OCTAVES = 3.0  # first step of a search for a limit
FARTHEST = 1000.0  # largest distance of a price from 1, in octaves
CLOSE = 0.12  # octaves between the bounds at which a limit is found
FARTHER, MISSES = 0.2, 3  # octaves between the tries beyond a limit; failures in a row that end them


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
    """The largest price found with measure(price) <= limit. RefusedError if no price meets it."""
    good = bad = None
    at, loss = math.log2(start), math.inf
    for _ in range(TRIES):
        loss = measure(power(at))
        if loss <= limit:
            good = at
        else:
            bad = at
        if good is not None and bad is not None and bad - good < CLOSE:
            break
        if good is None:
            at -= OCTAVES
        elif bad is None:
            at += OCTAVES
        else:
            at = (good + bad) / 2
    if good is None:
        raise RefusedError(
            f"{who}: max_drop={limit:g} is not met even at the lowest price of a bit: the loss is still "
            f"{loss:g}{unit and f' {unit}'}. Allow more, or leave out sensitive weights with where='!NAME'."
        )
    # A score that counts samples is not monotonic: a slightly higher price may meet the limit again.
    misses, ahead = 0, good
    while bad is not None and misses < MISSES and ahead - good < OCTAVES:
        ahead += FARTHER
        fine = measure(power(ahead)) <= limit
        good, misses = (ahead, 0) if fine else (good, misses + 1)
    return power(good)
