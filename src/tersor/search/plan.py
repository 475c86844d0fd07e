"""Plan: which recipes are tried, in order of cost. Each has a few dials, from mild to hard.

bits      how weights are stored: 8 rounded, fewer by rdoq; all are coded at the end
trained   bits again, reached by training under a price (penalize): far smaller files, and an epoch a trial
keep      the share of MACs or parameters that slim keeps; then trained, towards the given model if it can be
          if time counts, or slim is refused: shorten and factorize too, from where the way before ended
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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

from tersor.search.trials import Trial, Trials
from tersor.steps import Distill, Entropy, Factorize, Finetune, Penalize, Quantize, Rdoq, Shorten, Slim

BITS = (8.0, 5.0, 4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.75, 1.5, 1.3, 1.0)
TRAINED = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
KEEPS = (0.8, 0.65, 0.5, 0.4, 0.32, 0.25, 0.2, 0.15, 0.11, 0.08)
PLAIN = BITS[0]  # bits at which nothing is weighed
MULTIPLE = 8  # of channels, where time counts: kernels compute whole vectors
TEACHER = 0.5  # weight of the given model's outputs in the loss, if they have one

T = TypeVar("T")
Ahead = Callable[[list[T]], None]  # told the values that may be asked about next, the next one first


def nothing(values: list[Any]) -> None:
    """Nothing runs ahead."""


class Find(Protocol):
    """`last`, `first` or `onward`."""

    def __call__(
        self, values: Sequence[T], holds: Callable[[T], bool], ahead: Ahead[T] = ..., /
    ) -> T | None: ...


class Setting(NamedTuple):
    """Where all dials are. At first the whole network, in 8 bits."""

    way: str = ""  # the step that removes parts of the network
    keep: float = 1.0
    bits: float = PLAIN
    trained: bool = False


def slim(keep: float, *, timed: bool) -> Slim:
    if timed:
        return Slim(keep=keep, of="macs", multiple=MULTIPLE, unmet="nearest")
    return Slim(keep=keep, of="parameters", unmet="nearest")


def shorten(keep: float, *, timed: bool) -> Shorten:
    return Shorten(keep=keep, of="macs" if timed else "parameters", unmet="nearest")


def factorize(keep: float, *, timed: bool) -> Factorize:
    # Where time counts each layer gets a share of its own: the largest weights are not the slowest layers.
    if timed:
        return Factorize(keep=keep, per="tensor", layers=True, method="spatial", multiple=MULTIPLE)
    return Factorize(keep=keep, layers=True, method="spatial")


WAYS: dict[str, Callable[..., Any]] = {"slim": slim, "shorten": shorten, "factorize": factorize}


@dataclass
class Plan:
    """The trials of a search."""

    trials: Trials
    aim: str  # "size", "latency" or "accuracy"
    epochs: float = 0.0  # of each training; 0: none
    lr: float = 0.001
    teacher: float = TEACHER  # 0: the task's loss alone
    integers: bool = False  # activations are integers too
    refused: set[str] = field(default_factory=set)  # ways that this model does not take
    # Bits that the training of a shape was too short to go below, and the setting that showed it.
    floors: dict[Setting, tuple[float, Setting]] = field(default_factory=dict)
    # By a digest of a shape's weights: the way and the keep that had them first.
    made: dict[str, tuple[str, float]] = field(default_factory=dict)

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
        whole = self.point(Setting())
        if not whole.why and whole.latency is not None and whole.latency["ratio"][1] > 1:
            return True
        self.integers = False
        floats = self.point(Setting())
        return bool(not whole.why and (floats.why or ratio(whole) > ratio(floats)))

    def hardest(self) -> None:
        """The hardest settings that lose little."""
        fits, reached = self.trials.loses_little, 0
        if self.aim == "size":
            self.store(Setting(), last, fits)
        for way in self.ways():
            shapes = shapes_of(way)
            least = self.search(onward if reached else last, shapes[reached:], fits)
            if least is None or (least.way and self.point(least).after is None):
                continue  # the step removes nothing from this network
            # Fewer bits make no float network faster, and more units make none.
            if self.fast(self.point(least)):
                reached = shapes.index(least)
                self.climb(reversed(shapes[: reached + 1]), last, fits)

    def mildest(self) -> None:
        """The mildest settings that are small and fast enough."""
        fits, reached = self.trials.small_and_fast, 0
        for way in self.ways():
            shapes = shapes_of(way)
            if self.trials.budget.latency is None:  # all are fast enough
                fast: Setting | None = shapes[0]
            elif reached:
                fast = self.search(onward, shapes[reached:0:-1], self.fast)
            else:
                fast = self.search(first, shapes, self.fast)
            if fast is None:
                continue
            reached = shapes.index(fast)
            hard = [shape._replace(bits=BITS[-1]) for shape in shapes[reached:]]
            most: Setting | None = hard[0]
            if not fits(self.point(hard[0])):
                most = self.search(first, hard[1:], fits)
                self.search(first, self.trained(fast), fits)
            if most is not None:
                self.climb(shapes[reached + hard.index(most) :], first, fits)

    def fast(self, trial: Trial) -> bool:
        """Whether a trial is within the bound on latency, on which bits have no effect."""
        return not trial.why and "latency" not in self.trials.over(trial)

    def ways(self) -> Iterator[str]:
        """The steps that remove parts of the network. Later ones seldom give smaller files, so they are for
        time, or for models that those before refuse."""
        for number, way in enumerate(WAYS):
            if self.trials.runtime or number == len(self.refused):
                yield way

    def climb(self, shapes: Iterable[Setting], find: Find, fits: Callable[[Trial], bool]) -> None:
        """Search bits at one shape after the other, as long as what is aimed at gets less."""
        least = math.inf
        for shape in shapes:
            if self.aim == "latency" and self.worth(self.point(shape))[0] >= least:
                return  # bits do not change it
            now = min((self.worth(trial)[0] for trial in self.store(shape, find, fits)), default=math.inf)
            if now >= least:
                return
            least = now

    def store(self, shape: Setting, find: Find, fits: Callable[[Trial], bool]) -> list[Trial]:
        """Search both dials of bits at a shape; the trials where they end."""
        rounded = [shape._replace(bits=bits) for bits in BITS]
        ends = [self.search(find, dial, fits) for dial in (rounded, self.trained(shape))]
        return [self.point(end) for end in ends if end is not None]

    def trained(self, shape: Setting) -> list[Setting]:
        """The dial of bits that are trained, if there is training and bytes count."""
        if not self.epochs or (self.aim == "latency" and self.trials.budget.size is None):
            return []
        return [shape._replace(bits=bits, trained=True) for bits in TRAINED]

    def search(self, find: Find, dial: list[Setting], fits: Callable[[Trial], bool]) -> Setting | None:
        """Search a dial. What may be asked for next runs ahead."""

        def ahead(settings: list[Setting]) -> None:
            self.trials.run_ahead([self.planned(self.reachable(setting)) for setting in settings])

        return find(dial, lambda setting: fits(self.point(setting)), ahead)

    def point(self, setting: Setting) -> Trial:
        """The trial at a setting, run and judged."""
        setting = self.reachable(setting)
        trial = self.planned(setting)
        if setting.way in self.refused:
            return replace(trial, why="the step was refused")
        if trial.after is not None:
            begin = self.trials.shape(trial.after.chain[0])
            if begin.nothing:
                return self.point(setting._replace(way="", keep=1.0))
            if weights := self.trials.weights_of(begin):
                way, keep = self.made.setdefault(weights, (setting.way, setting.keep))
                if (way, keep) != (setting.way, setting.keep):  # both keeps round to the same units or ranks
                    return self.point(setting._replace(way=way, keep=keep))
            after = self.trials.shape(trial.after)
            trial = replace(trial, after=after)
            if after.chain[0].why:  # not the training's: it may only have diverged at this keep
                self.refused.add(setting.way)
        found = self.trials.judged(trial)
        if found.short and found.reached is not None:
            shape, now = setting._replace(bits=PLAIN), (found.reached, setting)
            self.floors[shape] = min(now, self.floors.get(shape, now))
        return found

    def reachable(self, setting: Setting) -> Setting:
        """The setting, or the one that gave the same: a training that was too short for one size ends where
        it ends for any smaller one."""
        floor, shown = self.floors.get(setting._replace(bits=PLAIN), (0.0, setting))
        return shown if setting.trained and setting.bits < floor else setting

    def planned(self, setting: Setting) -> Trial:
        """The trial at a setting, before it runs."""
        words, after = list[str](), None
        if setting.way:
            words = [f"{setting.way} {setting.keep:g}"]
            after = Trial(words[0], (WAYS[setting.way](setting.keep, timed=bool(self.trials.runtime)),))
            if self.epochs:
                after = Trial(f"{words[0]} trained", (self.training(),), after)
        words += ["int8"] if self.integers else []
        words += [f"{setting.bits:g} bits{' trained' if setting.trained else ''}"]
        return Trial(", ".join(words), tuple(self.coded(setting.bits, trained=setting.trained)), after)

    def training(self) -> Any:
        """The step that trains what is left."""
        if self.teacher:
            return Distill(epochs=self.epochs, lr=self.lr, teacher_weight=self.teacher)
        return Finetune(epochs=self.epochs, lr=self.lr)

    def coded(self, bits: float, *, trained: bool) -> Iterator[Any]:
        """Steps that store weights."""
        if trained:
            yield Penalize(bits=bits, epochs=self.epochs, lr=self.lr, teacher_weight=self.teacher)
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


def shapes_of(way: str) -> list[Setting]:
    """The whole network, then what a way makes of it, from mild to hard."""
    return [Setting(), *(Setting(way, keep) for keep in KEEPS)]


def last(values: Sequence[T], holds: Callable[[T], bool], ahead: Ahead[T] = nothing) -> T | None:
    """The last value that holds, where those before it do and those after it do not. Tries about log2(N)."""
    low, high = 0, len(values)  # the first `low` hold; those from `high` on do not
    while low < high:
        places = halves(low, high)
        ahead([values[place] for place in places])
        if holds(values[places[0]]):
            low = places[0] + 1
        else:
            high = places[0]
    return values[low - 1] if low else None


def halves(low: int, high: int) -> list[int]:
    """The places that halving may ask about between two ends: the middle, those of both halves, and so on."""
    found, spans = list[int](), [(low, high)]
    for begin, end in spans:  # which grows
        if begin < end:
            middle = (begin + end) // 2
            found.append(middle)
            spans += [(begin, middle), (middle + 1, end)]
    return found


def first(values: Sequence[T], holds: Callable[[T], bool], ahead: Ahead[T] = nothing) -> T | None:
    """The first value that holds, where those before it do not and those after it do."""
    return last(tuple(reversed(values)), holds, ahead)


def onward(values: Sequence[T], holds: Callable[[T], bool], ahead: Ahead[T] = nothing) -> T | None:
    """As `last`, one after the other: the way to ask about values of which few hold."""
    found = None
    for place, value in enumerate(values):
        ahead([*values[place:]])
        if not holds(value):
            break
        found = value
    return found
