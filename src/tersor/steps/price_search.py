"""Price search: find the price of a bit (the Lagrange multiplier lambda) that meets a target.

least(bits, budget)      the least price whose bits are within the budget; bits fall by about half a bit a
                         weight when the price doubles
largest(loss, limit)     the largest price whose loss is within the limit, by power laws through the losses
                         around it
A loss that counts samples is noisy: the last bit of a sum changes some codes, and then some answers. The best
of the prices tried would be the luckiest one. Power laws average the noise of all tries.
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
NEAR = 0.5  # octaves between the bounds around which power laws are fitted
BELOW, ABOVE, AROUND = -0.8, 1.3, 12  # first and last octave of the tries for them, and their number
LEAST = 4  # tries of a power law
STEP = 1e-3  # octaves, within which a limit is found on a power law

Loss = tuple[float, float]  # a loss, and the end of its interval


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
    measure: Callable[[float], Loss], limit: float, start: float, *, who: str, unit: str = "points"
) -> float:
    """The largest price at which the end of the loss's interval is within the limit, by power laws fitted to
    some fifteen tries around it.

    `measure`: price -> (loss, end of its interval). If the tries follow no power law (a loss of 0 that rises
    at once), the largest price found to be within the limit. RefusedError if no price is.
    """
    tried: dict[float, Loss] = {}  # log2 of the price: what was measured

    def sought(at: float) -> bool:
        tried[at] = measure(power(at))
        return tried[at][1] <= limit

    good, bad = bracket(sought, math.log2(start), NEAR)
    if good is None:
        raise RefusedError(
            f"{who}: max_drop={limit:g} is not met even at the lowest price of a bit: the loss is still "
            f"{tried[min(tried)][1]:g}{unit and f' {unit}'}. Allow more, or leave out sensitive weights with "
            f"where='!NAME'."
        )
    if bad is None:
        return power(good)
    middle = (good + bad) / 2
    for number in range(AROUND):
        sought(middle + BELOW + (ABOVE - BELOW) * number / (AROUND - 1))
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


def crossing(tried: Mapping[float, Loss], limit: float, middle: float) -> float | None:
    """The log price at which fitted loss + fitted half of its interval reach the limit, from the tries around
    `middle`. None if these follow no power law.

    loss = a * price by weighted least squares: a small loss is quadratic in the rounding errors, whose
    squares are proportional to the price. With a fitted exponent the result varies twice as much.
    half = b * price^c by least squares of logarithms. Tries above the limit count too: their loss has less
    noise in relation to its size.
    """
    near = {at - middle: loss for at, loss in tried.items() if BELOW <= at - middle <= ABOVE}
    known = all(math.isfinite(end) for _, end in near.values())
    ends = [end for _, end in near.values()]
    if not known or len(near) < LEAST or not min(ends) <= limit < max(ends):
        return None
    at, loss = np.array(list(near)), np.array([amount for amount, _ in near.values()])
    half = np.array(ends) - loss
    sure = half > 0
    weight = 1 / np.where(sure, half, np.maximum(np.abs(loss), 1e-6 * np.abs(loss).max())) ** 2
    x = 2.0**at
    size = float((weight * x * loss).sum() / (weight * x * x).sum())
    slope, offset = np.polyfit(at[sure], np.log2(half[sure]), 1) if sure.sum() >= LEAST else (0.0, -math.inf)
    fine = np.arange(BELOW, ABOVE, STEP)
    end = size * 2.0**fine + 2.0 ** (slope * fine + offset)
    over = np.flatnonzero(end > limit)
    return middle + float(fine[over[0]]) if len(over) and over[0] else None
