"""Latency: compare the speed of candidates on a machine with other load.

each round: one burst of every candidate in turn, the order reversed in every second round
time[r] = burst / calls, ratio[r] = a[r] / b[r]; medians with intervals by order statistics
All run in one process: clock speed, caches and other load drift over seconds and would look like a difference
between candidates. Within a round they are nearly the same for all, and the ratio cancels them.
Cost: rounds * (burst + one call) for each candidate.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

from tersor.errors import SettingError
from tersor.maths.statistics import median_interval

MOST_CALLS = 1_000_000  # in a burst, if a call is shorter than the clock's resolution
NS_A_MS = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median over rounds with its 95 % interval, and every round."""

    median_ms: float
    low: float
    high: float
    rounds: tuple[float, ...]  # ms a call, in the order measured
    calls: int  # a burst


class Ratio(NamedTuple):
    """The ratio of two candidates' times, with its 95 % interval."""

    middle: float
    low: float
    high: float


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 40,
    burst_ms: float = 4.0,
    warmup_ms: float = 50.0,
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time the candidates against each other, by name.

    A burst is as many calls as take about `burst_ms`, at least one, the same number in every round. Each
    candidate first runs for `warmup_ms`, at least three times. `watch(done, rounds)` is called between
    rounds, untimed.
    """
    if not runs or not all(callable(run) for run in runs.values()):
        raise SettingError("interleave: runs is a dict of functions without arguments, at least one, by name")
    if not isinstance(rounds, int) or rounds < 1:
        raise SettingError(f"interleave: rounds={rounds!r}, but it is a count, 1 or more")
    if not 0 < burst_ms < math.inf or not 0 <= warmup_ms < math.inf:
        raise SettingError(
            f"interleave: burst_ms={burst_ms}, warmup_ms={warmup_ms}, but these are milliseconds, "
            "the first above 0, the second from 0 on"
        )
    # A collection in the middle of a burst would count for the candidate that happens to run.
    collecting = gc.isenabled()
    gc.disable()
    try:
        calls = {name: _calls(_warm(run, warmup_ms), burst_ms) for name, run in runs.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name in reversed(list(runs)) if number % 2 else runs:
                found[name].append(_burst(runs[name], calls[name]))
            if watch is not None:
                watch(number + 1, rounds)
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(median(times), *median_interval(times), tuple(times), calls[name])
        for name, times in found.items()
    }


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times longer `a` takes than `b`: the median of the rounds' ratios, 95 % interval.

    Both must come from one call of `interleave`. SettingError if their numbers of rounds differ.
    """
    if len(a.rounds) != len(b.rounds) or not a.rounds:
        raise SettingError(
            f"ratio: {len(a.rounds)} and {len(b.rounds)} rounds; take both from one call of interleave"
        )
    if min(b.rounds) <= 0:
        raise SettingError("ratio: the second timing has rounds of 0 ms; use a longer burst_ms")
    each = [first / second for first, second in zip(a.rounds, b.rounds, strict=True)]
    return Ratio(median(each), *median_interval(each))


def _warm(run: Callable[[], object], warmup_ms: float) -> int:
    """Run until caches are filled and kernels are chosen. Returns the shortest call in ns."""
    begin, shortest, count = perf_counter_ns(), 1 << 62, 0
    while count < 3 or perf_counter_ns() - begin < warmup_ms * NS_A_MS:
        start = perf_counter_ns()
        run()
        shortest = min(shortest, perf_counter_ns() - start)
        count += 1
    return shortest


def _calls(shortest_ns: int, burst_ms: float) -> int:
    return min(MOST_CALLS, max(1, round(burst_ms * NS_A_MS / max(shortest_ns, 1))))


def _burst(run: Callable[[], object], calls: int) -> float:
    """ms a call. The first call is not timed, since it refills the caches that the previous candidate
    used."""
    run()
    repeats = range(calls)
    start = perf_counter_ns()
    for _ in repeats:
        run()
    return (perf_counter_ns() - start) / calls / NS_A_MS
