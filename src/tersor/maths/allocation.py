"""Allocation: how many units each family keeps, so that a budget of cost is met at the least damage.

min sum over f of damage[f](n[f])      with cost(n) <= target, n[f] one of the family's options
cost(n) = sum over terms of constant * width * width, or of any function of widths, such as a measured time
width   = fixed + sum over f of units[f] * n[f]

The cost is no sum over families: a convolution costs inputs * outputs. So each change is priced at the
current point (Everett 1963: damage per cost saved). From all units downwards, and from the cheapest point
upwards, the change with the least damage per cost is made until the target is met. Any option can be jumped
to, so plateaus of the cost are crossed and options that save nothing are never taken. Then changes are tried
in the order of damage + price * cost, each repaired by the best changes of other families, and kept if the
damage falls. Deterministic. It is a heuristic; on small random problems it finds what brute force finds.
Cost: some hundred to thousand changes, each O(options + terms of the families that share a term).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tersor.errors import SettingError

Array = npt.NDArray[np.float64]
_Point = tuple[list[int], list[int], float, Array, Array]

SLACK = 1e-9  # relative, for sums of floats in another order
TRIES = 400  # changes tried at most, beside all that improved
WIDE = 48  # changes tried from one point
ONE = (1.0, 0.0)  # a width that is 1 whatever is kept


@dataclass(frozen=True)
class Width:
    """Channels of an axis: `fixed` + the sum of `units` for each unit kept, by family. A family may be on an
    axis several times over: a head has many channels."""

    fixed: float = 0.0
    units: tuple[tuple[int, float], ...] = ()  # (family, channels of one unit)

    def at(self, counts: Sequence[int]) -> float:
        return self.fixed + sum(each * counts[family] for family, each in self.units)

    def each(self, family: int) -> float:
        return sum(each for one, each in self.units if one == family)


@dataclass(frozen=True)
class Term:
    """`constant` * the product of at most two widths, or * `of(*widths)`, called once for equal widths."""

    constant: float
    widths: tuple[Width, ...]
    of: Callable[..., float] | None = None
    found: dict[tuple[float, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.of is None and len(self.widths) > 2:
            raise SettingError(
                f"allocate: a product of {len(self.widths)} widths, but at most 2 are allowed; give `of`"
            )

    def value(self, widths: tuple[float, ...]) -> float:
        if self.of is None:
            return self.constant * math.prod(widths)
        if widths not in self.found:
            self.found[widths] = self.constant * self.of(*widths)
        return self.found[widths]

    def lines(self, counts: Sequence[int], family: int) -> list[tuple[float, float]]:
        """Each width as (a, b): a + b * n, where n is the count of one family."""
        slopes = [width.each(family) for width in self.widths]
        return [(w.at(counts) - b * counts[family], b) for w, b in zip(self.widths, slopes, strict=True)]


class Costs(Protocol):
    """What `allocate` asks of a cost."""

    def total(self, counts: Sequence[int]) -> float: ...

    def along(self, counts: Sequence[int], family: int, tried: Array) -> Array:
        """The cost where one family takes each of the counts `tried`, but for a constant."""

    def near(self, family: int) -> Iterable[int]:
        """The families for which `along` depends on this family's count, itself among them."""


class Cost:
    """A sum of terms."""

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(terms)
        self._touched: dict[int, list[Term]] = {}
        self._near: dict[int, set[int]] = {}
        for term in self.terms:
            families = {family for width in term.widths for family, _ in width.units}
            for family in families:
                self._touched.setdefault(family, []).append(term)
                self._near.setdefault(family, set()).update(families)

    def total(self, counts: Sequence[int]) -> float:
        return math.fsum(term.value(tuple(w.at(counts) for w in term.widths)) for term in self.terms)

    def along(self, counts: Sequence[int], family: int, tried: Array) -> Array:
        slope, square, timed = 0.0, 0.0, np.zeros(len(tried))
        for term in self._touched.get(family, ()):
            lines = term.lines(counts, family)
            if term.of is None:
                (a, b), (c, d) = [*lines, ONE, ONE][:2]
                slope += term.constant * (a * d + b * c)
                square += term.constant * b * d
            else:
                tables = [(a + b * tried).tolist() for a, b in lines]
                timed += [term.value(widths) for widths in zip(*tables, strict=True)]
        return (slope + square * tried) * tried + timed

    def near(self, family: int) -> Iterable[int]:
        return sorted(self._near.get(family, {family}))


class Allocation(NamedTuple):
    """The chosen counts. Where no choice meets the target, the cheapest found, and `fits` is False."""

    counts: tuple[int, ...]
    cost: float
    damage: float
    fits: bool


def allocate(
    options: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], cost: Costs, target: float
) -> Allocation:
    """Choose one option for each family.

    `options[f]`: counts, ascending; the first is the least that is allowed. `damages[f]`: of each option,
    not rising, usually 0 for the last. SettingError if they do not match.
    """
    _check(options, damages, target)
    search = _Search(options, damages, cost, target)
    starts = []
    search.go([len(each) - 1 for each in options])
    if search.down():
        starts.append(search.local())
    search.cheapest()
    if search.fits:
        starts.append(search.local())
    if starts:
        search.go(min(starts)[2])
    counts = tuple(search.counts)
    return Allocation(counts, cost.total(counts), search.damage, search.fits)


class _Search:
    """A point, one option for each family, and what each single change from it would add in cost and damage.

    All options of all families are in one list, K long: `start[f]` is where those of family f begin.
    """

    def __init__(
        self,
        options: Sequence[Sequence[int]],
        damages: Sequence[Sequence[float]],
        cost: Costs,
        target: float,
    ) -> None:
        self.cost, self.sizes = cost, [len(each) for each in options]
        self.start = [0, *np.cumsum(self.sizes).tolist()]
        self.families = np.repeat(np.arange(len(options)), self.sizes)  # [K]
        self.units = np.concatenate([np.asarray(each, dtype=np.float64) for each in options])  # [K]
        self.damages = np.concatenate([np.asarray(each, dtype=np.float64) for each in damages])  # [K]
        self.limit = target + SLACK * abs(target)
        self.more_cost, self.more_damage = np.zeros_like(self.units), np.zeros_like(self.units)  # [K]
        self.go([len(each) - 1 for each in options])
        self.tiny = SLACK * max(abs(self.total), 1e-300)

    def go(self, at: Sequence[int]) -> None:
        """Go to a point."""
        self.at = list(at)
        self.counts = [int(self.units[self.start[f] + k]) for f, k in enumerate(at)]
        self.total = self.cost.total(self.counts)
        self._price(range(len(at)))

    def move(self, k: int) -> None:
        """Let one family take another option."""
        family = int(self.families[k])
        self.total += float(self.more_cost[k])
        self.at[family], self.counts[family] = k - self.start[family], int(self.units[k])
        self._price(self.cost.near(family))

    def _price(self, families: Iterable[int]) -> None:
        for f in families:
            mine = slice(self.start[f], self.start[f + 1])
            along = self.cost.along(self.counts, f, self.units[mine])
            self.more_cost[mine] = along - along[self.at[f]]
            self.more_damage[mine] = self.damages[mine] - self.damages[self.start[f] + self.at[f]]

    @property
    def damage(self) -> float:
        return math.fsum(float(self.damages[self.start[f] + k]) for f, k in enumerate(self.at))

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def down(self, locked: int = -1) -> bool:
        """Make the change with the least damage per cost saved until the target is met. What is saved beyond
        the target counts for nothing. False if no change saves."""
        while not self.fits:
            useful = (self.more_cost < -self.tiny) & (self.families != locked)
            saved = np.minimum(-self.more_cost, self.total - self.limit + self.tiny)
            each = np.where(useful, self.more_damage / np.where(useful, saved, 1.0), np.inf)
            best = int(np.argmin(each))
            if not useful[best]:
                return False
            self.move(best)
        return True

    def up(self, locked: int = -1) -> None:
        """Give back the units with the most damage undone per cost while they fit, and last those without
        damage."""
        while True:
            fit = (self.more_cost <= self.limit - self.total) & (self.families != locked)
            better = fit & (self.more_damage < 0)
            if better.any():
                gain = np.where(better, -self.more_damage / np.maximum(self.more_cost, self.tiny), -np.inf)
                self.move(int(np.argmax(gain)))
                continue
            more = fit & (self.more_damage == 0) & (self.units > np.array(self.counts)[self.families])
            if not more.any():
                return
            self.move(int(np.argmax(np.where(more, self.more_cost, -np.inf))))

    def cheapest(self) -> None:
        """Go to a point that no change of one family makes cheaper, with as few units."""
        self.go([0] * len(self.at))
        while float(self.more_cost.min()) < -self.tiny:
            self.move(int(np.argmin(self.more_cost)))

    def local(self) -> tuple[float, float, list[int]]:
        """Improve a point that fits until no tried change does. (damage, -cost, options)"""
        self.up()
        best, left = self._key(), TRIES
        while left > 0:
            here = self._copy()
            for k in self._promising():
                left -= 1
                self.move(k)
                family = int(self.families[k])
                if self.down(family):
                    self.up(family)
                    self.up()
                    if self._key() < best:
                        break
                self._restore(here)
            else:
                return best
            best = self._key()
        return best

    def _copy(self) -> _Point:
        return self.at[:], self.counts[:], self.total, self.more_cost.copy(), self.more_damage.copy()

    def _restore(self, point: _Point) -> None:
        at, counts, self.total, cost, damage = point
        self.at, self.counts, self.more_cost, self.more_damage = at[:], counts[:], cost.copy(), damage.copy()

    def _key(self) -> tuple[float, float, list[int]]:
        return self.damage, -self.total, list(self.at)

    def _promising(self) -> list[int]:
        """Changes in the order of damage + price * cost. The price is between what the next unit saved would
        cost and what the last one given back undid."""
        saves, costs = self.more_cost < -self.tiny, self.more_cost > self.tiny
        low = (self.more_damage[saves] / -self.more_cost[saves]).min(initial=math.inf)
        high = (-self.more_damage[costs] / self.more_cost[costs]).max(initial=0.0)
        price = math.sqrt(max(low, 0.0) * high) if math.isfinite(low) else high
        score = self.more_damage + price * self.more_cost
        score[[self.start[f] + k for f, k in enumerate(self.at)]] = np.inf  # where it is
        order = np.argsort(score, kind="stable")[:WIDE]
        return [int(k) for k in order if score[k] < np.inf]


def _check(options: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], target: float) -> None:
    if not options or len(options) != len(damages) or math.isnan(target):
        raise SettingError(
            f"allocate: {len(options)} lists of options, {len(damages)} of damages, target={target}; it "
            "takes one list of each for every family, at least one, and a number"
        )
    for family, (counts, damage) in enumerate(zip(options, damages, strict=True)):
        rising = all(a < b for a, b in zip(counts, counts[1:], strict=False))
        if not counts or len(counts) != len(damage) or not rising or counts[0] < 0:
            raise SettingError(
                f"allocate: family {family} has the options {list(counts)} and {len(damage)} damages; "
                "options ascend from 0 or more, with one damage each"
            )
        if not np.isfinite(np.asarray(damage, dtype=np.float64)).all():
            raise SettingError(f"allocate: a damage of family {family} is NaN or infinite")
