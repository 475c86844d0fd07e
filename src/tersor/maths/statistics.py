"""Statistics: how sure a measured number is, in plain floats.

wilson           interval of a share                                         Wilson 1927
mcnemar          exact two-sided test of paired right and wrong answers      McNemar 1947
paired           mean difference of paired scores, interval, p               Agresti, Min 2005; Student 1908
median_interval  order statistics: no assumption but independent values      David, Nagaraja 2003, section 7.1
entropy_bits     -sum p log2 p: what no coder of single symbols beats        Shannon 1948
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tersor.errors import SettingError

Z95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """low, high of the share successes / n; (0, 1) where nothing was tried."""
    if not 0 <= successes <= n:
        raise SettingError(f"wilson: {successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula is exact; rounding must not leave the share outside of its interval.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def mcnemar(before_correct: Iterable[float], after_correct: Iterable[float]) -> float:
    """p of "neither is better": of the samples on which they differ, either is as likely to be right."""
    before, after = _pairs("mcnemar", before_correct, after_correct)
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    won = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    return min(1.0, 2 * _half_binomial(min(lost, won), lost + won))


def paired(before: Iterable[float], after: Iterable[float]) -> tuple[float, float, float, float]:
    """Mean of after - before, its 95 % interval low and high, and p of "no difference". One score a sample.

    Scores that are all 0 or 1: p by mcnemar, interval by Agresti and Min (half a count added to each of the
    four cells), good from about 10 samples; the two are different methods and may differ when p is near 0.05.
    Other scores: Student's t, exact for normal differences and good for about 30 samples or more of others.
    Equal differences throughout have no spread: the interval is a point, and p is that of their signs alone.
    One sample says nothing: the interval is infinite and p is 1.
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
    half = student_quantile(0.975, n - 1) * error
    return mean, mean - half, mean + half, min(1.0, 2 * student_tail(abs(mean) / error, n - 1))


def median_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """low, high: two of the values, with the median between them at least so surely.

    Fewer than 6 values cannot promise 95 %: the result is then their whole range.
    """
    ordered = sorted(_floats(values))
    n = len(ordered)
    if not n:
        raise SettingError("median_interval: no values")
    if not 0 < level < 1:
        raise SettingError(f"median_interval: level={level}, but 0 < level < 1")
    k = 0  # the largest with P(fewer than k of n below the median) <= (1 - level) / 2
    while 2 * (k + 1) <= n and _half_binomial(k, n) <= (1 - level) / 2:
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def log2_choose(n: int, k: int) -> float:
    """Bits to say which k of n, if all choices are equally likely."""
    if not 0 <= k <= n:
        raise SettingError(f"log2_choose: {k} of {n}")
    return _log_choose(n, k) / math.log(2)


def entropy_bits(counts: Iterable[float]) -> float:
    """Bits a symbol, from how often each occurs; times their sum, the bound in bits of the whole stream."""
    some = [c for c in _floats(counts) if c]
    if any(c < 0 for c in some):
        raise SettingError("entropy_bits: a count is negative")
    total = math.fsum(some)
    return max(0.0, math.fsum(c / total * math.log2(total / c) for c in some))


def student_tail(t: float, freedom: int) -> float:
    """P(T > t), t >= 0: half the incomplete beta function at f / (f + t^2)."""
    return 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, for 0.5 < p < 1, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - p else (low, middle)
    return (low + high) / 2


def _agresti_min(lost: int, won: int, n: int) -> tuple[float, float]:
    """Interval of (won - lost) / n for matched pairs."""
    size = n + 2
    b, c = (lost + 0.5) / size, (won + 0.5) / size
    half = Z95 * math.sqrt((b + c - (c - b) ** 2) / size)
    return max(-1.0, c - b - half), min(1.0, c - b + half)


def _half_binomial(k: int, n: int) -> float:
    """P(X <= k) for n fair coins."""
    top = n * math.log(2)
    return min(1.0, math.fsum(math.exp(_log_choose(n, j) - top) for j in range(k + 1)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _beta(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function, by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - _beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) / a * total


def _floats(values: Iterable[float]) -> list[float]:
    """A list; tensors and arrays in one step instead of value by value."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return [float(v) for v in listed]


def _pairs(
    who: str, before: Iterable[float], after: Iterable[float]
) -> tuple[Sequence[float], Sequence[float]]:
    first, second = _floats(before), _floats(after)
    if len(first) != len(second) or not first:
        raise SettingError(
            f"{who}: {len(first)} scores before, {len(second)} after; one each a sample, at least 1"
        )
    return first, second
