"""K-means: one-dimensional clustering of values into a codebook of K entries, by least squared error.

init "exact"     optimal, by dynamic programming (exact_kmeans.py), for up to 20,000 distinct values; for more
                 values, optimal on a fine histogram, then Lloyd on all values
init "linear"    Lloyd from K entries evenly spaced from min to max       Han, Mao, Dally 2016, section 3.2
init "density"   Lloyd from K quantiles
init "kmeans++"  Lloyd from K values drawn by squared distance            Arthur, Vassilvitskii 2007
cost             one sort of N values; a Lloyd iteration is K binary searches, since a cluster of sorted
                 values is an interval and its sums are differences of cumulative sums
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.exact_kmeans import optimal_cuts
from tersor.maths.units import check_choice, finite

INITS = ("exact", "linear", "density", "kmeans++")
DISTINCT = 20_000  # largest number of distinct values for which "exact" is exact
WORK = DISTINCT * 256  # largest product of distinct values and entries for which "exact" is exact
BINS = 4096
DRAW = 1 << 16  # points that kmeans++ draws from, at most

Floats = NDArray[np.float64]


def cluster(
    values: Tensor,
    entries: int,
    *,
    init: str = "exact",
    iterations: int = 50,
    weights: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cluster values [N] to (index int64 [N], book float32 [K], sorted), with values ~ book[index].

    K = entries, or the number of distinct values if that is smaller (then nothing is lost). `weights` [N]:
    weight of each value's squared error. Values of weight 0 do not influence the book and get the nearest
    entry. With "exact" and up to 20,000 distinct values (fewer for more than 256 entries) the result is
    optimal. For more values it starts from the optimum of a histogram of about 4096 bins, and above 1250
    entries from the density that is asymptotically optimal. From there, and for the other inits, at most
    `iterations` rounds of Lloyd lead to a local optimum. `seed` only affects "kmeans++". SettingError for bad
    arguments, NaN or infinity.
    """
    check_choice("cluster", "init", init, INITS)
    if entries < 1:
        raise SettingError(f"cluster: entries={entries}, but a codebook has 1 entry or more")
    if values.ndim != 1:
        raise SettingError(
            f"cluster: values have shape {list(values.shape)}, but must be flat. Flatten them to [N]"
        )
    values = finite("cluster", values)
    points, mass = _points(values, weights)
    if len(points) <= entries:
        book = points
    elif init == "exact":
        book = _exact(points, mass, entries, iterations)
    else:
        if init == "linear":
            first = np.linspace(points[0], points[-1], entries)
        elif init == "density":
            first = _quantiles(points, mass, entries)
        else:
            first = _plus_plus(points, mass, entries, seed)
        book = _lloyd(points, mass, first, iterations)
    table = torch.from_numpy(np.unique(book.astype(np.float32))).to(values.device)
    return assign(values, table), table


def assign(values: Tensor, book: Tensor) -> Tensor:
    """Index int64 of the nearest entry of a sorted book, in the shape of `values`. Ties go down."""
    book = book.detach().double()
    return torch.bucketize(values.detach().double(), (book[1:] + book[:-1]) / 2)


def _points(values: Tensor, weights: Tensor | None) -> tuple[Floats, Floats]:
    """(distinct values, sorted, total weight of each). Without values: one point at 0."""
    if weights is None:
        points, mass = torch.unique(values, return_counts=True)
    else:
        if (
            weights.shape != values.shape
            or not bool((weights >= 0).all())
            or not bool(weights.isfinite().all())
        ):
            raise SettingError("cluster: weights must be finite and not negative, one for each value")
        points, where = torch.unique(values, return_inverse=True)
        mass = torch.zeros(len(points), dtype=torch.float64, device=values.device)
        mass.index_add_(0, where, weights.detach().double())
        if len(points) and not bool((mass > 0).any()):
            raise SettingError(
                "cluster: all weights are 0, so no value counts. Omit the weights, or mask fewer values"
            )
        points, mass = points[mass > 0], mass[mass > 0]
    if not len(points):
        return np.zeros(1), np.ones(1)
    return points.double().cpu().numpy(), mass.double().cpu().numpy()


def _exact(points: Floats, mass: Floats, entries: int, iterations: int) -> Floats:
    """Dynamic programming on the points, or on a histogram of them followed by Lloyd."""
    if len(points) <= DISTINCT and len(points) * entries <= WORK:
        return _means(points, mass, optimal_cuts(points, mass, entries))
    if entries * BINS > WORK:
        return _lloyd(points, mass, _cube_root(points, mass, entries), iterations)
    # Half of the bins have equal counts, half have equal widths: equal counts alone would merge the tails.
    filled = mass.cumsum()
    counts = np.searchsorted(filled, np.linspace(0, filled[-1], BINS // 2 + 1)[1:-1])
    widths = np.searchsorted(points, np.linspace(points[0], points[-1], BINS // 2 + 1)[1:-1])
    edges = np.unique(np.concatenate([[0], counts, widths]))
    edges = edges[edges < len(points)]
    weight = np.add.reduceat(mass, edges)
    middle = np.add.reduceat(mass * points, edges) / weight
    first = _means(middle, weight, optimal_cuts(middle, weight, entries))
    return _lloyd(points, mass, first, iterations)


def _quantiles(points: Floats, mass: Floats, entries: int) -> Floats:
    """The middle of each of K equal parts of the mass. Duplicates are harmless: Lloyd moves empty entries."""
    filled = mass.cumsum()
    at = np.searchsorted(filled, (np.arange(entries) + 0.5) / entries * filled[-1])
    return points[np.minimum(at, len(points) - 1)]


def _cube_root(points: Floats, mass: Floats, entries: int) -> Floats:
    """Entry density = cube root of the values' density: asymptotically optimal (Panter, Dite 1951)."""
    edges = np.concatenate([points[:1], _quantiles(points, mass, BINS // 4), points[-1:]])
    # A bin of mass m gets entries in proportion to (m / width)^(1/3) * width.
    place = np.concatenate([[0.0], (np.diff(edges) ** (2 / 3)).cumsum()])
    return np.interp((np.arange(entries) + 0.5) / entries * place[-1], place, edges)


def _plus_plus(points: Floats, mass: Floats, entries: int, seed: int) -> Floats:
    """Draw each next entry with odds of mass times squared distance to the earlier entries."""
    if len(points) > DRAW:
        edges = np.arange(DRAW) * len(points) // DRAW
        mass = np.add.reduceat(mass, edges)
        points = points[edges]
    draw = np.random.Generator(np.random.PCG64(seed)).random(entries)
    book = np.empty(entries)
    gap = np.ones_like(points)
    scale = max(abs(points[0]), abs(points[-1]))  # squares of tiny differences must not underflow
    for k in range(entries):
        odds = (mass * gap).cumsum()
        place = int(np.searchsorted(odds, draw[k] * odds[-1], side="right"))
        book[k] = points[min(place, len(points) - 1)]
        here = np.square((points - book[k]) / scale)
        gap = here if k == 0 else np.minimum(gap, here)
    return np.sort(book)


def _means(points: Floats, mass: Floats, cuts: NDArray[np.int64]) -> Floats:
    """Weighted mean of each interval points[cuts[k]:cuts[k + 1]]; none is empty."""
    return np.asarray(np.add.reduceat(mass * points, cuts) / np.add.reduceat(mass, cuts))


def _lloyd(points: Floats, mass: Floats, book: Floats, iterations: int) -> Floats:
    """Lloyd's algorithm until no point changes its entry. Empty entries move to intervals of large error."""
    middle = points.mean()  # cumulative sums of centered values lose fewer digits
    x = points - middle
    scale = np.abs(x).max()
    x = x / scale
    filled, first, second = (np.concatenate([[0.0], (mass * x**p).cumsum()]) for p in (0, 1, 2))
    book = np.sort((book - middle) / scale)
    cuts = _nearest(x, book)
    for _ in range(iterations):
        some = np.diff(cuts) > 0
        total, moment, energy = (np.diff(sums[cuts]) for sums in (filled, first, second))
        book = np.divide(moment, total, out=book.copy(), where=some)
        if not some.all():
            book = np.sort(_revive(x, cuts, book, some, energy - moment * book))
        before, cuts = cuts, _nearest(x, book)
        if np.array_equal(cuts, before):
            break
    return np.asarray(book[np.diff(cuts) > 0] * scale + middle)


def _nearest(x: Floats, book: Floats) -> NDArray[np.int64]:
    """Cuts such that entry k is nearest to x[cuts[k]:cuts[k + 1]]."""
    cuts = np.searchsorted(x, (book[1:] + book[:-1]) / 2, side="right")
    return np.concatenate([[0], cuts, [len(x)]])


def _revive(
    x: Floats, cuts: NDArray[np.int64], book: Floats, some: NDArray[np.bool_], error: Floats
) -> Floats:
    """Move each empty entry to the far end of one of the intervals of largest error."""
    book = book.copy()
    wide = np.flatnonzero(some & (np.diff(cuts) > 1))
    worst = wide[np.argsort(-error[wide], kind="stable")]
    for empty, full in zip(np.flatnonzero(~some), worst, strict=False):
        ends = x[cuts[full]], x[cuts[full + 1] - 1]
        book[empty] = max(ends, key=lambda end: abs(end - book[full]))
    return book
