"""Plan: which recipes are tried, in order of cost. Each has two dials, from mild to hard.

bits   how weights are stored: 8 rounded, fewer by rdoq; all are coded at the end
keep   the share of MACs or parameters that slim keeps; then trained towards the given model, if it can be
Harder settings are taken to lose more, weigh less and take less time, so a dial is searched by halving. Where
that does not hold, a better setting may be missed; what is chosen was measured in any case.

size, latency   bits on all units; the least keep within the drop, and bits there; then milder ones
accuracy        the mildest keep that is small and fast enough, and bits there; then harder ones
                each as long as what is aimed at gets less
If latency counts, `quantize activations=8` comes first; if the file is no faster than float weights, these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tersor.search.trials import Trial, Trials
from tersor.steps import Distill, Entropy, Quantize, Rdoq, Slim

BITS = (8.0, 5.0, 4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.75, 1.5, 1.3)
KEEPS = (0.8, 0.65, 0.5, 0.4, 0.32, 0.25, 0.2, 0.15, 0.11, 0.08)
PLAIN = BITS[0]  # bits at which nothing is weighed
MULTIPLE = 8  # of channels, where time counts: kernels compute whole vectors
TEACHER = 0.5  # weight of the given model's outputs in the loss

T = TypeVar("T")
Find = Callable[[Sequence[float], Callable[[float], bool]], float | None]


@dataclass
class Plan:
    """The trials of a search."""

    trials: Trials
    aim: str  # "size", "latency" or "accuracy"
    epochs: float = 0.0  # of training after channels were removed; 0: none
    lr: float = 0.001
    integers: bool = False  # activations are integers too

    def walk(self) -> None:
        """Run the trials that the plan asks for. Their results are in `trials.found`."""
        if self.trials.runtime:
            self.integers = self.faster()
        if self.aim == "accuracy":
            self.mildest()
        else:
            self.hardest()

    def faster(self) -> bool:
        """Whether integers run faster than float weights, of all units."""
        self.integers = True
        whole = self.point(1.0, PLAIN)
        if not whole.why and whole.latency is not None and whole.latency["ratio"][1] > 1:
            return True
        self.integers = False
        floats = self.point(1.0, PLAIN)
        return bool(not whole.why and (floats.why or ratio(whole) > ratio(floats)))

    def hardest(self) -> None:
        """The hardest settings that lose little."""
        fits, keeps = self.trials.loses_little, (1.0, *KEEPS)
        if self.aim == "size":
            last(BITS, lambda bits: fits(self.point(1.0, bits)))
        least = last(keeps, lambda keep: fits(self.point(keep, PLAIN)))
        # Fewer bits make no float network faster, and more units make none.
        if least is not None and "latency" not in self.trials.over(self.point(least, PLAIN)):
            self.climb(reversed(keeps[: keeps.index(least) + 1]), last, fits)

    def mildest(self) -> None:
        """The mildest settings that are small and fast enough."""
        fits, keeps = self.trials.small_and_fast, (1.0, *KEEPS)
        most = first(keeps, lambda keep: fits(self.point(keep, BITS[-1])))
        if most is not None:
            self.climb(keeps[keeps.index(most) :], first, fits)

    def climb(self, keeps: Iterable[float], find: Find, fits: Callable[[Trial], bool]) -> None:
        """Search bits at one keep after the other, as long as what is aimed at gets less."""
        least = math.inf
        for keep in keeps:
            if self.aim == "latency" and self.worth(self.point(keep, PLAIN))[0] >= least:
                return  # bits do not change it
            bits = find(BITS, lambda bits: fits(self.point(keep, bits)))  # noqa: B023 (called at once)
            if bits is None or (now := self.worth(self.point(keep, bits))[0]) >= least:
                return
            least = now

    def point(self, keep: float, bits: float) -> Trial:
        """The trial at these settings."""
        shape = None if keep == 1.0 else self.trials.shape(f"slim {keep:g}", self.slimmed(keep))
        words = [shape.name] if shape else []
        words += ["int8"] if self.integers else []
        words += [f"{bits:g} bits"]
        return self.trials.judged(", ".join(words), self.stored(bits), shape)

    def slimmed(self, keep: float) -> Iterator[Any]:
        """Steps that remove units."""
        if self.trials.runtime:
            yield Slim(keep=keep, of="macs", multiple=MULTIPLE, unmet="nearest")
        else:
            yield Slim(keep=keep, of="parameters", unmet="nearest")
        if self.epochs:
            yield Distill(epochs=self.epochs, lr=self.lr, teacher_weight=TEACHER)

    def stored(self, bits: float) -> Iterator[Any]:
        """Steps that store weights."""
        if bits != PLAIN:
            yield Rdoq(bits=bits, per="channel" if self.integers else "auto")
        if self.integers:
            yield Quantize(activations=8)
        elif bits == PLAIN:
            yield Quantize()
        yield Entropy()

    def ranked(self) -> list[Trial]:
        """The trials within the budget, those with the least of what is aimed at first."""
        trials = self.trials
        return sorted(
            (trial for trial in trials.found.values() if not trial.why and not trials.over(trial)),
            key=self.worth,
        )

    def worth(self, trial: Trial) -> tuple[float, float]:
        """What is aimed at, then bytes; less is better."""
        time = 1 / ratio(trial) if trial.latency else 0.0
        return {"size": trial.nbytes, "latency": time, "accuracy": trial.drop[0]}[self.aim], trial.nbytes


def ratio(trial: Trial) -> float:
    """How many times as fast as the given model."""
    return float(trial.latency["ratio"][0]) if trial.latency else 0.0


def last(values: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """The last value that holds, where those before it do and those after it do not. Tries about log2(N)."""
    low, high = 0, len(values)  # the first `low` hold; those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if holds(values[middle]):
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else None


def first(values: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """The first value that holds, where those before it do not and those after it do."""
    return last(tuple(reversed(values)), holds)
