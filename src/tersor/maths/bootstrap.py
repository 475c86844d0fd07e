"""Bootstrap: how sure a statistic of a whole set is, by drawing the set anew from itself.

r = 1..R    draw N samples of the N with repeats; value_r = value(what was drawn)            Efron 1979
interval    the 2.5 % and 97.5 % quantiles of value_r        p    twice the smaller share of differences on
                                                                  one side of 0        Efron, Tibshirani 1993
Two models are drawn in pairs: the same samples of both. Statistics that add up, [N, S], are summed by how
often each sample was drawn: one product [R, N] x [N, S] in slices. Cost: R * N draws, R calls of `value`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

RESAMPLES = 10_000
FEWEST = 1_000  # resamples of a large set
DRAWS = 200_000_000  # of samples in all: beyond it a set is resampled less often
AT_ONCE = 4_000_000  # draws held at once
KNOWN = 0.95  # share of the resamples that must have a value, or nothing is said of the spread


def resamples(count: int) -> int:
    """How often a set of so many samples is drawn anew where statistics add up."""
    return max(FEWEST, min(RESAMPLES, DRAWS // max(count, 1)))


def of_sums(sets: Sequence[Tensor], value: Callable[[Tensor], float], times: int, seed: int = 0) -> Floats:
    """The value of each resample of each set, [sets, R]; sets [N, S] have the same samples in one order."""
    samples, widths = len(sets[0]), [item.shape[1] for item in sets]
    joined = torch.cat([item.double() for item in sets], 1)  # [N, S of all]
    found = np.empty((len(sets), times))
    at = 0
    for counts in drawn(samples, times, seed):
        sums = (torch.from_numpy(counts) @ joined).split(widths, 1)  # of each set [R, S]
        for row in range(len(counts)):
            found[:, at] = [value(total[row]) for total in sums]
            at += 1
    return found


def of_lists(
    sets: Sequence[Sequence[Any]], value: Callable[[list[Any]], float], times: int, seed: int = 0
) -> Floats:
    """The same of sets whose samples are objects: the value is a function of the list of them."""
    found = np.empty((len(sets), times))
    rng = np.random.default_rng(seed)
    for at in range(times):
        places = rng.integers(0, len(sets[0]), len(sets[0]))
        found[:, at] = [value([item[place] for place in places]) for item in sets]
    return found


def drawn(samples: int, times: int, seed: int) -> Iterator[Floats]:
    """How often each sample is drawn in each resample, in slices [r, N]; the same for a seed."""
    rng = np.random.default_rng(seed)
    slices = max(1, AT_ONCE // samples)
    for begin in range(0, times, slices):
        rows = min(slices, times - begin)
        places = rng.integers(0, samples, (rows, samples)) + samples * np.arange(rows)[:, None]
        counts = np.bincount(places.reshape(-1), minlength=rows * samples)
        yield counts.reshape(rows, samples).astype(np.float64)


def interval(values: Floats) -> tuple[float, float]:
    """The 95 % interval of resampled values; infinite where too many of them are not numbers."""
    found = known(values)
    return (-math.inf, math.inf) if found is None else tuple(np.quantile(found, (0.025, 0.975)).tolist())


def p_of(differences: Floats) -> float:
    """p of "no difference" from resampled differences; the least is 2 / (R + 1)."""
    found = known(differences)
    if found is None:
        return 1.0
    side = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(found) + 1))


def known(values: Floats) -> Floats | None:
    """The values that are numbers: a resample may lack what a statistic needs, such as a class."""
    found = values[np.isfinite(values)]
    return found if len(found) >= KNOWN * len(values) and len(found) else None
