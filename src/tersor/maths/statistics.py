"""Statistics: confidence intervals and tests for measured numbers, in plain floats.

wilson           interval of a proportion                                    Wilson 1927
mcnemar          exact two-sided test of paired right and wrong answers      McNemar 1947
paired           mean difference of paired scores, interval, p               Agresti, Min 2005; Student 1908
median_interval  order statistics; assumes only independent values           David, Nagaraja 2003, section 7.1
entropy_bits     -sum p log2 p: the bound of a coder of single symbols       Shannon 1948
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tersor.errors import SettingError

Z95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval (low, high) of the proportion successes / n. (0, 1) if n is 0."""
    if not 0 <= successes <= n:
        raise SettingError(f"wilson: {successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is exact; without this, rounding could put the proportion outside its interval.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def mcnemar(before_correct: Iterable[float], after_correct: Iterable[float]) -> float:
    """Two-sided p of the hypothesis that neither is better: right equally often where the two differ."""
    before, after = _pairs("mcnemar", before_correct, after_correct)
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    won = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    return min(1.0, 2 * _fair_coins(min(lost, won), lost + won))


def paired(before: Iterable[float], after: Iterable[float]) -> tuple[float, float, float, float]:
    """Mean of after - before, its 95 % interval low and high, and p of "no difference". One score a sample.

    If all scores are 0 or 1: p by mcnemar, interval by Agresti and Min (half a count added to each of the
    four cells), valid from about 10 samples. They are different methods and may disagree when p is near 0.05.
    Other scores: Student's t, exact for normal differences, valid from about 30 samples of other ones.
    If all differences are equal, the interval is a point and p is that of a sign test. With one sample the
    interval is infinite and p is 1.
    """
    first, second = _pairs("paired", before, after)
    n = len(first)
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    mean = math.fsum(gaps) / n
    if {*first, *second} <= {0, 1}:
        return mean, *_agresti_min(gaps.count(-1), gaps.count(1), n), mcnemar(first, second)
    if n == 1:
        return mean, -math.inf, math.inf, 1.0
    spread = math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / (n - 1))
    error = spread / math.sqrt(n)
    if error <= 1e-15 * abs(mean) or error == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - n)
    from scipy import special

    half = float(special.stdtrit(n - 1, 0.975)) * error
    return mean, mean - half, mean + half, min(1.0, 2 * float(special.stdtr(n - 1, -abs(mean) / error)))


def median_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """Interval (low, high) of the median: two of the values, with at least this confidence level.

    Fewer than 6 values cannot reach 95 %; their whole range is returned then.
    """
    ordered = sorted(_floats(values))
    n = len(ordered)
    if not n:
        raise SettingError("median_interval: no values")
    if not 0 < level < 1:
        raise SettingError(f"median_interval: level={level}, but 0 < level < 1")
    k = 0  # the largest k with P(fewer than k of n values below the median) <= (1 - level) / 2
    while 2 * (k + 1) <= n and _fair_coins(k, n) <= (1 - level) / 2:
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def entropy_bits(counts: Iterable[float]) -> float:
    """Entropy in bits a symbol, from the count of each symbol. Times the sum of the counts: of the stream."""
    some = [c for c in _floats(counts) if c]
    if any(c < 0 for c in some):
        raise SettingError("entropy_bits: a count is negative")
    total = math.fsum(some)
    return max(0.0, math.fsum(c / total * math.log2(total / c) for c in some))


def _agresti_min(lost: int, won: int, n: int) -> tuple[float, float]:
    """Interval of (won - lost) / n for matched pairs."""
    size = n + 2
    b, c = (lost + 0.5) / size, (won + 0.5) / size
    half = Z95 * math.sqrt((b + c - (c - b) ** 2) / size)
    return max(-1.0, c - b - half), min(1.0, c - b + half)


def _fair_coins(k: int, n: int) -> float:
    """P(X <= k) for the heads X of n fair coins."""
    from scipy import special

    return float(special.bdtr(k, n, 0.5))


def _floats(values: Iterable[float]) -> list[float]:
    """A list of floats. Tensors and arrays are converted in one step."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return [float(v) for v in listed]


def _pairs(
    who: str, before: Iterable[float], after: Iterable[float]
) -> tuple[Sequence[float], Sequence[float]]:
    first, second = _floats(before), _floats(after)
    if len(first) != len(second) or not first:
        raise SettingError(
            f"{who}: {len(first)} scores before, {len(second)} after; give one a sample, at least 1"
        )
    return first, second
