"""Plan: which recipes are tried, in order of cost. Each has a few dials, from mild to hard.

bits      how weights are stored: 8 rounded, fewer by rdoq; all are coded at the end
trained   bits again, reached by training under a price (penalize): far smaller files, and an epoch a trial
keep      the share of MACs or parameters that slim keeps; then trained towards the given model, if it can be
          if time counts, or slim is refused: shorten and factorize too, from where the way before ended
Harder settings are taken to lose more, weigh less and take less time, so a dial is searched by halving. Where
that does not hold, a better setting may be missed; what is chosen was measured in any case.

size, latency   bits on all units; the least keep within the drop, and bits there; then milder ones
accuracy        the mildest keep that is small and fast enough, and bits there; then harder ones
                each as long as what is aimed at gets less
If latency counts, `quantize activations=8` comes first; if the file is no faster than float weights, these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from tersor.search.trials import Trial, Trials
from tersor.steps import Distill, Entropy, Factorize, Penalize, Quantize, Rdoq, Shorten, Slim

BITS = (8.0, 5.0, 4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.75, 1.5, 1.3, 1.0)
TRAINED = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
KEEPS = (0.8, 0.65, 0.5, 0.4, 0.32, 0.25, 0.2, 0.15, 0.11, 0.08)
PLAIN = BITS[0]  # bits at which nothing is weighed
MULTIPLE = 8  # of channels, where time counts: kernels compute whole vectors
TEACHER = 0.5  # weight of the given model's outputs in the loss

T = TypeVar("T")


class Find(Protocol):
    """`last`, `first` or `onward`."""

    def __call__(self, values: Sequence[T], holds: Callable[[T], bool], /) -> T | None: ...


class Shape(NamedTuple):
    """Which share of the network stays, and the step that removes the rest."""

    way: str
    keep: float


WHOLE = Shape("", 1.0)


def shapes_of(way: str) -> list[Shape]:
    """The whole network, then what a way makes of it, from mild to hard."""
    return [WHOLE, *(Shape(way, keep) for keep in KEEPS)]


def slim(keep: float, *, timed: bool) -> Slim:
    if timed:
        return Slim(keep=keep, of="macs", multiple=MULTIPLE, unmet="nearest")
    return Slim(keep=keep, of="parameters", unmet="nearest")


def shorten(keep: float, *, timed: bool) -> Shorten:
    return Shorten(keep=keep, of="macs" if timed else "parameters", unmet="nearest")


def factorize(keep: float, *, timed: bool) -> Factorize:
    return Factorize(keep=keep, layers=True, method="spatial", multiple=MULTIPLE if timed else 1)


WAYS: dict[str, Callable[..., Any]] = {"slim": slim, "shorten": shorten, "factorize": factorize}


@dataclass
class Plan:
    """The trials of a search."""

    trials: Trials
    aim: str  # "size", "latency" or "accuracy"
    epochs: float = 0.0  # of each training; 0: none
    lr: float = 0.001
    integers: bool = False  # activations are integers too
    refused: set[str] = field(default_factory=set)  # ways that this model does not take

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
        whole = self.point(WHOLE, PLAIN)
        if not whole.why and whole.latency is not None and whole.latency["ratio"][1] > 1:
            return True
        self.integers = False
        floats = self.point(WHOLE, PLAIN)
        return bool(not whole.why and (floats.why or ratio(whole) > ratio(floats)))

    def hardest(self) -> None:
        """The hardest settings that lose little."""
        fits = self.trials.loses_little
        if self.aim == "size":
            self.store(WHOLE, last, fits)
        reached = 0
        for way in self.ways():
            shapes = shapes_of(way)
            find: Find = onward if reached else last
            least = find(shapes[reached:], lambda shape: fits(self.point(shape, PLAIN)))
            # Fewer bits make no float network faster, and more units make none.
            if least is not None and "latency" not in self.trials.over(self.point(least, PLAIN)):
                reached = shapes.index(least)
                self.climb(reversed(shapes[: reached + 1]), last, fits)

    def mildest(self) -> None:
        """The mildest settings that are small and fast enough."""
        fits, reached = self.trials.small_and_fast, 0
        for way in self.ways():
            shapes = shapes_of(way)
            milder = shapes[reached:0:-1]
            fast = onward(milder, self.fast) if reached else first(shapes, self.fast)
            if fast is None:
                continue
            reached = shapes.index(fast)
            most: Shape | None = fast
            if not fits(self.point(fast, BITS[-1])):
                most = first(shapes[reached + 1 :], lambda shape: fits(self.point(shape, BITS[-1])))
                self.store(fast, first, fits)  # bits that are trained may do
            if most is not None:
                self.climb(shapes[shapes.index(most) :], first, fits)

    def fast(self, shape: Shape) -> bool:
        """Whether a shape is within the bound on latency, on which bits have no effect."""
        if self.trials.budget.latency is None:
            return True
        plain = self.point(shape, PLAIN)
        return not plain.why and "latency" not in self.trials.over(plain)

    def ways(self) -> Iterator[str]:
        """The steps that remove parts of the network. Later ones seldom give smaller files, so they are for
        time, or for models that those before refuse."""
        for number, way in enumerate(WAYS):
            if self.trials.runtime or number == len(self.refused):
                yield way

    def climb(self, shapes: Iterable[Shape], find: Find, fits: Callable[[Trial], bool]) -> None:
        """Search bits at one shape after the other, as long as what is aimed at gets less."""
        least = math.inf
        for shape in shapes:
            if self.aim == "latency" and self.worth(self.point(shape, PLAIN))[0] >= least:
                return  # bits do not change it
            now = min((self.worth(trial)[0] for trial in self.store(shape, find, fits)), default=math.inf)
            if now >= least:
                return
            least = now

    def store(self, shape: Shape, find: Find, fits: Callable[[Trial], bool]) -> list[Trial]:
        """Search both dials of bits at a shape; the trials where they end."""
        ends = []
        if (bits := find(BITS, lambda bits: fits(self.point(shape, bits)))) is not None:
            ends.append(self.point(shape, bits))
        if self.epochs and (self.aim != "latency" or self.trials.budget.size is not None):
            bits = find(TRAINED, lambda bits: fits(self.point(shape, bits, trained=True)))
            ends += [] if bits is None else [self.point(shape, bits, trained=True)]
        return ends

    def point(self, shape: Shape, bits: float, *, trained: bool = False) -> Trial:
        """The trial at these settings."""
        words, after = list[str](), None
        if shape.way in self.refused:
            return Trial(shape.way, (), why="the step was refused")
        if shape.way:
            words = [f"{shape.way} {shape.keep:g}"]
            after = self.trials.shape(words[0], self.shaped(shape))
            self.refused |= {shape.way} if after.why else set()
        words += ["int8"] if self.integers else []
        words += [f"{bits:g} bits{' trained' if trained else ''}"]
        return self.trials.judged(", ".join(words), self.coded(bits, trained=trained), after)

    def shaped(self, shape: Shape) -> Iterator[Any]:
        """Steps that remove parts of the network."""
        yield WAYS[shape.way](shape.keep, timed=bool(self.trials.runtime))
        if self.epochs:
            yield Distill(epochs=self.epochs, lr=self.lr, teacher_weight=TEACHER)

    def coded(self, bits: float, *, trained: bool) -> Iterator[Any]:
        """Steps that store weights."""
        if trained:
            yield Penalize(bits=bits, epochs=self.epochs, lr=self.lr, teacher_weight=TEACHER)
        elif bits != PLAIN:
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


def onward(values: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """As `last`, one after the other: the way to ask about values of which few hold."""
    return next(reversed([*itertools.takewhile(holds, values)]), None)
