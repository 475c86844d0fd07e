"""Table plan loops: depths, precision, lists and the search for a shape, compiled: they dominate encoding.

All numbers are integers, or floats whose every operation IEEE 754 defines, so that the same counts give the
same table on every machine.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from tersor.coders.loops import I64, I64_2, INT
from tersor.compiled import compiled

OCTAVES, MAX_BITS, UNIT_BITS = 20, 16, 24  # as in tables.py and table_plan.py
SHAPE_DETAIL, SLOPE_SCALE, SHAPE_SHIFT, PEAK_SCALE = 6, 32, 14, 4
STRIDES = (8, 4, 2, 1)
MOVES = 8  # moves of a search at each stride, at most
I64_OUT, I64_2_OUT = types.int64[::1], types.int64[:, ::1]


@njit
def octaves_of(n, bits, whole, part):  # type: ignore[no-untyped-def]
    """Octaves above the rarest weight, whole and part [K], for counts [K]. Shares below 0.5 are equal."""
    count, most = 0, 0.0
    for j in range(n.size):
        count += n[j]
    free = float((1 << bits) - n.size)
    for j in range(n.size):
        # Each symbol has a frequency of 1 anyway; weights divide the rest.
        part[j] = max(n[j] / count * (1 << bits) - 1.0, 0.5) / free
        most = max(most, part[j])
    for j in range(n.size):
        mantissa, exponent = math.frexp(part[j] / most)
        whole[j] = OCTAVES + exponent - 1
        part[j] = 2.0 * mantissa - 1.0
        if whole[j] < 0:
            whole[j], part[j] = 0, 0.0


@njit
def depths_at(whole, part, detail, depths):  # type: ignore[no-untyped-def]
    """The depths [K] nearest to octaves, in steps of 2^-detail."""
    for j in range(whole.size):
        level = (whole[j] << detail) + np.int64(np.rint(part[j] * (1 << detail)))
        depths[j] = (OCTAVES << detail) - level


@njit
def payload_cost(n, depths, detail, bits, logs, least, sums):  # type: ignore[no-untyped-def]
    """Cost of counts [K] with depths [K], without the rounding of states: see table_plan.cost_of.

    Ends early, with any higher number, above `least`. `sums` [K] is overwritten."""
    part, total = (1 << detail) - 1, 0
    for j in range(n.size):
        level = (OCTAVES << detail) - depths[j]
        total += ((1 << detail) + (level & part)) << (level >> detail)
        sums[j] = total
    free = (1 << bits) - n.size
    cost, edge, inverse = 0, 0, 1.0 / total
    for j in range(n.size):
        # A division of integers below 2^52, by a product that is off by at most one.
        last, number = edge, free * sums[j]
        edge = np.int64(number * inverse)
        rest = number - edge * total
        if rest < 0:
            edge -= 1
        elif rest >= total:
            edge += 1
        if n[j]:
            cost += n[j] * ((bits << UNIT_BITS) - logs[1 + edge - last])
            if cost > least:
                return cost
    return cost


@njit
def with_rounding(cost, bits):  # type: ignore[no-untyped-def]
    return cost + (3 * cost >> (11 + 2 * (MAX_BITS - bits)))


@compiled(I64_OUT(I64, INT, INT, INT, I64))
def costs_by_bits(n: np.ndarray, first: int, last: int, detail: int, logs: np.ndarray) -> np.ndarray:
    """Cost of counts [K] for each precision from `first` to `last` bits, with depths of one detail."""
    costs = np.empty(last + 1 - first, np.int64)
    whole, part = np.empty(n.size, np.int64), np.empty(n.size, np.float64)
    depths, sums = np.empty(n.size, np.int64), np.empty(n.size, np.int64)
    for bits in range(first, last + 1):
        octaves_of(n, bits, whole, part)
        depths_at(whole, part, detail, depths)
        most = np.iinfo(np.int64).max
        costs[bits - first] = with_rounding(payload_cost(n, depths, detail, bits, logs, most, sums), bits)
    return costs


@compiled(types.void(I64, INT, I64, I64_2_OUT, I64_OUT))
def lists_of(n: np.ndarray, bits: int, logs: np.ndarray, depths: np.ndarray, costs: np.ndarray) -> None:
    """Fill depths [D, K] for counts [K] at each detail 0 .. D - 1, and the cost of each [D]."""
    whole, part = np.empty(n.size, np.int64), np.empty(n.size, np.float64)
    sums, most = np.empty(n.size, np.int64), np.iinfo(np.int64).max
    octaves_of(n, bits, whole, part)
    for detail in range(costs.size):
        depths_at(whole, part, detail, depths[detail])
        costs[detail] = with_rounding(payload_cost(n, depths[detail], detail, bits, logs, most, sums), bits)


@njit
def float7(code):  # type: ignore[no-untyped-def]
    return (8 + (code - 1) % 8) << ((code - 1) // 8) if code > 0 else 0


@njit
def shape_into(offsets, peak, center, slope, bend, height, depths):  # type: ignore[no-untyped-def]
    """Depths [K] of a shape; the peak is the symbol with index `peak`, or none if it is -1."""
    a, b, most = SLOPE_SCALE * float7(slope), float7(bend), OCTAVES << SHAPE_DETAIL
    for j in range(offsets.size):
        t = abs(2 * offsets[j] - center)
        depth = (a * t + b * t * t) >> SHAPE_SHIFT
        if peak >= 0 and j != peak:
            depth += PEAK_SCALE * height
        depths[j] = min(depth, most)


@compiled(I64_OUT(I64, I64, INT, INT, I64_2, I64, I64))
def search(
    n: np.ndarray,
    offsets: np.ndarray,
    bits: int,
    peak: int,
    points: np.ndarray,
    most: np.ndarray,
    logs: np.ndarray,
) -> np.ndarray:
    """Parameters [4] of a shape for counts [K]: a local search with shrinking strides from the best point.

    `points` [T, 4]: center, slope, bend, height of the peak; `most` [4]: their largest values. `peak` as in
    shape_into. On a tie the first of center, lower and higher wins, parameter by parameter.
    """
    depths, sums = np.empty(n.size, np.int64), np.empty(n.size, np.int64)
    here, there, back = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4, np.int64)
    chosen = np.empty(4, np.int64)
    raw = np.iinfo(np.int64).max
    least = raw
    for row in range(points.shape[0]):
        shape_into(offsets, peak, points[row, 0], points[row, 1], points[row, 2], points[row, 3], depths)
        cost = payload_cost(n, depths, SHAPE_DETAIL, bits, logs, raw, sums)
        if with_rounding(cost, bits) < least or row == 0:
            raw, least = cost, with_rounding(cost, bits)
            for k in range(4):
                here[k] = points[row, k]
    for stride in STRIDES:
        moved = False
        for _ in range(MOVES):
            best = least
            for turn in range(1, 81 if peak >= 0 else 27):
                code = turn if peak >= 0 else 3 * turn
                for k in range(3, -1, -1):
                    step = code % 3
                    code //= 3
                    there[k] = here[k] + (-stride if step == 1 else stride if step == 2 else 0)
                    there[k] = min(max(there[k], 0), most[k])
                # What was near the last place was tried there and was no better than this place.
                known = moved
                for k in range(4):
                    low, high = max(back[k] - stride, 0), min(back[k] + stride, most[k])
                    if there[k] != back[k] and there[k] != low and there[k] != high:
                        known = False
                if known:
                    continue
                shape_into(offsets, peak, there[0], there[1], there[2], there[3], depths)
                cost = payload_cost(n, depths, SHAPE_DETAIL, bits, logs, raw, sums)
                if with_rounding(cost, bits) < best:
                    raw, best = cost, with_rounding(cost, bits)
                    for k in range(4):
                        chosen[k] = there[k]
            if best == least:
                break
            moved, least = True, best
            for k in range(4):
                back[k], here[k] = here[k], chosen[k]
    return here
