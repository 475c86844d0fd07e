"""Budget: the price of a bit that a target asks for, found by trying.

least(bits, budget)      the least price whose bits are within the budget; bits fall by about half a bit a
    weight where the price doubles
largest(loss, limit)     the largest price whose loss is within the limit, by bisection of its logarithm, and
    a few tries beyond
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tersor.errors import RefusedError

TRIES = 16
PATIENCE = 4  # tries on one side of a budget, after which steps double
OCTAVES = 3.0  # how far a search for a limit steps at first
FARTHEST = 1000.0  # octaves of a price from 1
CLOSE = 0.12  # of an octave: then a limit is found
FARTHER, MISSES = 0.2, 3  # octaves between prices beyond it that are tried, until so many in a row fail


def power(at: float) -> float:
    """The price of this logarithm, within what a float holds."""
    return 2.0 ** max(-FARTHEST, min(FARTHEST, at))


def least(
    measure: Callable[[float], float], budget: float, start: float, *, slope: float, near: float, who: str
) -> float:
    """The least price found with measure(price) <= budget; stops within a share `near` of the budget.

    `slope`: by how much the measure falls per octave, about. RefusedError where no price is enough.
    """
    over: tuple[float, float] | None = None  # log price and measure, beyond the budget and within it
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
            # Of weights that are all alike the bits do not fall for many octaves, and then at once.
            least_step = 0.05 * 2.0 ** max(0, turn - PATIENCE)
            at += min(12.0, max(-12.0, step + math.copysign(least_step, step)))
    if under is None:
        raise RefusedError(
            f"{who}: {budget / 8:.0f} bytes are asked of these weights, and the fewest found are "
            f"{found / 8:.0f}. Ask for more, or prune first."
        )
    return power(under[0])


def largest(
    measure: Callable[[float], float], limit: float, start: float, *, who: str, unit: str = "points"
) -> float:
    """The largest price found with measure(price) <= limit; RefusedError where no price has it."""
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
            f"{who}: max_drop={limit:g} is not met even where bits cost next to nothing: the loss is still "
            f"{loss:g}{unit and f' {unit}'}. Allow more, or leave out what is delicate with where='!NAME'."
        )
    # A score of whole samples goes up and down: a little farther on it may be met again.
    misses, ahead = 0, good
    while bad is not None and misses < MISSES and ahead - good < OCTAVES:
        ahead += FARTHER
        fine = measure(power(ahead)) <= limit
        good, misses = (ahead, 0) if fine else (good, misses + 1)
    return power(good)
