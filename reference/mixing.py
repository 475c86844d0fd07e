"""Mixing: a simple, slow decoder for section 11 of docs/streams.md.

mixing(settings, data, count, width, keep)      returns the symbols, or raises BadStream with the reason
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache

import numpy as np
from static import check, clip, wrap


@cache
def squash_table() -> list[int]:
    power, low = 2**60, []
    for _ in range(3072):
        low.append(2**76 // (2**60 + power))
        power = power * 1157433911791679357 >> 60
    return [clip(c, 1, 65535) for c in [*low[:0:-1], *(65536 - c for c in low)]]


def squash(x: int) -> int:
    return squash_table()[clip(x, -3071, 3071) + 3071]


@cache
def stretch(c: int) -> int:
    """The least log odds whose probability is at least that of the middle of step c."""
    return min(bisect_left(squash_table(), 16 * c + 8) - 3071, 3071)


def log(n: int) -> int:
    return n.bit_length()


def density(count: int, seen: int) -> int:
    if not seen:
        return 0
    parts = (2 * count + 1) * 256 // (2 * seen + 2)
    half = parts >> (log(parts) - 2) & 1 if log(parts) >= 2 else 0
    return clip(2 * log(parts) + half - 3, 1, 15)


def fine(parts: int) -> int:
    parts = min(parts, 65535)
    n = log(parts)
    return n if n < 3 else 4 * (n - 2) + (parts >> (n - 3) & 3)


def sign(v: int) -> int:
    return (v > 0) - (v < 0)


def agrees(v: int, negative: int) -> bool:
    return v != 0 and (v < 0) == (negative == 1)


class RowPredictor:
    """Predicts the signed logs of a row from those of earlier rows."""

    def __init__(self, columns: int) -> None:
        self.history: list[list[tuple[int, int]]] = [[] for _ in range(columns)]  # (row, signed log)
        self.row: dict[int, int] = {}  # signed logs of the current row
        self.weights: dict[int, int] = {}  # of earlier rows

    def predict(self, i: int) -> tuple[int, int]:
        terms = [self.weights.get(o, 0) * slog >> 4 for o, slog in self.history[i][-256:]]
        return sum(terms), sum(term * term for term in terms)

    def update(self, i: int, slog: int, total: int) -> None:
        earlier = self.history[i][-256:]
        step = (2**16 * slog - 8 * total) // (100 + sum(s * s for _, s in earlier))
        for o, s in earlier:
            self.weights[o] = clip(self.weights.get(o, 0) + step * s, -(2**20), 2**20)
        self.row[i] = slog

    def append_row(self, o: int) -> None:
        for i, slog in self.row.items():
            self.history[i].append((o, slog))
        self.row, self.weights = {}, {}


class Mixer:
    """The arithmetic decoder and its adaptive state."""

    def __init__(self, data: bytes, rate: int) -> None:
        self.data, self.rate, self.at = data, 3 + 3 * rate, 4
        self.low, self.high, self.code = 0, 2**32 - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.probability: dict[object, int] = {}
        self.seen: dict[object, int] = {}
        self.weights: dict[tuple[str, int], list[int]] = {}
        self.updates: dict[tuple[str, int], int] = {}

    def bit(self, contexts: list[object], *sets: tuple[str, int, int]) -> int:
        """Decode a bit. contexts: the most general one last. sets: two of (name, number, w)."""
        for c in contexts:
            if c not in self.seen:
                inherits = c != contexts[-1]
                self.probability[c] = self.probability.get(contexts[-1], 2**21) if inherits else 2**21
                self.seen[c] = 2 if inherits else 0
        inputs = [stretch(self.probability[c] >> 10) for c in contexts]
        dots = []
        for name, number, w in sets:
            weights = self.weights.setdefault((name, number), [65536 // w] * len(contexts))
            dots.append(sum(w * s for w, s in zip(weights, inputs, strict=True)))
        bit = self.arithmetic(squash(sum(dots) >> 17))
        for (name, number, _), dot in zip(sets, dots, strict=True):
            n = self.updates.get((name, number), 0)
            error = ((bit << 16) - squash(dot >> 16)) * (self.rate + 512 * self.rate // (16 + n))
            self.updates[name, number] = min(n + 1, 2047)
            weights = self.weights[name, number]
            for k, s in enumerate(inputs):
                weights[k] += s * error + 2**19 >> 20
        for c in contexts:
            n = self.seen[c]
            self.probability[c] += (bit * (2**22 - 1) - self.probability[c]) * (2**17 // (2 * n + 3)) >> 16
            self.seen[c] = min(n + 1, 1023)
        return bit

    def arithmetic(self, probability: int) -> int:
        middle = self.low + ((self.high - self.low) * probability >> 16)
        bit = int(self.code <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.at += 1
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, self.high << 8 & 0xFFFFFFFF | 0xFF
            self.code = self.code << 8 & 0xFFFFFFFF | byte
        return bit


def mixing(settings: int, data: bytes, count: int, width: int, keep: np.ndarray | None) -> np.ndarray:
    transposed, tree, zeros, rate = settings & 1, settings >> 1 & 1, settings >> 2 & 1, settings >> 3
    total = count if keep is None else keep.size
    check(len(data) >= 5 and total % width == 0, "mixing needs a head of 5 bytes and a whole matrix")
    zero, pivot, lag_a, lag_b = data[1:5]
    kept = np.ones((total // width, width), bool) if keep is None else keep.reshape(-1, width)
    kept = kept.T if transposed else kept
    mixer = Mixer(data[5:], rate)
    values = scan(mixer, kept, tree, zeros, (lag_a, lag_b))
    check(mixer.at - 3 == len(mixer.data), "bytes are left, or missing")
    check(mixer.data[-1] == (mixer.low >> 24) + 1, "a wrong last byte")
    found = (values.T if transposed else values).ravel()
    found = found if keep is None else found[keep.ravel()]
    symbols = []
    for v in found.tolist():
        if zeros and zero == pivot:
            symbols.append((v + pivot) % 256)
        elif zeros and v == 0:
            symbols.append(zero)
        else:
            symbols.append((v - (v > 0) + pivot) % 256)
    return np.array(symbols)


def scan(mixer: Mixer, kept: np.ndarray, tree: int, zeros: int, lags: tuple[int, int]) -> np.ndarray:
    lag_a, lag_b = lags
    rows, columns = kept.shape
    matrix = np.zeros((rows, columns), dtype=np.int64)
    seen, count, total, mean_size = [0] * columns, [0] * columns, [0] * columns, [0] * columns
    all_seen = all_count = all_total = 0
    period = lag_b or lag_a or 1
    predictor = RowPredictor(columns)

    def at(o: int, i: int) -> int:
        return int(matrix[o, i]) if o >= 0 and 0 <= i < columns else 0

    for o in range(rows):
        row_seen = row_count = row_total = row_size = 0
        for i in range(columns):
            if not kept[o, i]:
                continue
            check(mixer.at < len(mixer.data) + 4, "the stream ends too soon")
            l1, l2, u1, u2, ul, ur = (
                at(o, i - 1), at(o, i - 2), at(o - 1, i), at(o - 2, i), at(o - 1, i - 1), at(o - 1, i + 1)
            )  # fmt: skip
            p1 = at(o, i - lag_a) if lag_a else 0
            p2 = at(o, i - lag_a + 1) if lag_a > 1 else 0
            p3 = at(o, i - lag_a - 1) if lag_a else 0
            q1 = at(o, i - lag_b) if lag_b else 0
            a, b, c, d = abs(l1), abs(u1), abs(p1), abs(q1)
            near = min(7, log(2 * (a + b + c + d) + sum(map(abs, (l2, u2, ul, ur, p2, p3)))))
            csize, rsize = min(log(mean_size[i]), 15), min(log(row_size), 15)
            predicted, squares = predictor.predict(i)
            level, certainty = (
                clip(log(predicted * predicted) - 14, 0, 15),
                min(log(64 * predicted * predicted // (squares + 1)), 15),
            )
            nonzero = 1
            if zeros:
                sides = [k if 0 <= k < columns else i for k in (i - 1, i + 1, i - lag_a, i + lag_a)]
                flags = (l1 != 0, u1 != 0, p1 != 0, q1 != 0)
                mean = max(((2 * all_count + 1) << 16) // (2 * all_seen + 2), 1)
                by_row = ((row_count << 16) + 40 * mean) // (row_seen + 40)
                by_column = ((count[i] << 16) + 30 * mean) // (seen[i] + 30)
                x = fine(by_row * by_column // mean)
                nonzero = mixer.bit(
                    [
                        ("z0", flags, ul != 0, ur != 0, p2 != 0 or p3 != 0, u2 != 0),
                        ("z1", density(count[i], seen[i]), density(row_count, row_seen)),
                        ("z2", density(sum(count[k] for k in sides) + 4 * count[i], 8 * seen[i]), flags[:3]),
                        ("z3", csize, min(rsize, 8), min(a, 2)),
                        ("z4", i % 65536),
                        ("z5", o % 65536),
                        ("z6", i % period, flags[0], flags[2], flags[3]),
                        ("z7", level, x),
                        ("z8", certainty, level),
                        ("z",),
                    ],
                    ("zero, near", near, 10),
                    ("zero, share", x // 4, 10),
                )
            size = 0
            if nonzero:
                negative = mixer.bit(
                    [
                        ("s0", sign(l1), sign(u1), sign(p1), sign(q1)),
                        ("s1", sign(p1), sign(l2), sign(q1)),
                        ("s2", i % 65536, sign(u1)),
                        ("s3", sign(predicted), level),
                        ("s4", sign(predicted), certainty),
                        ("s5", sign(predicted), certainty, level),
                        ("s",),
                    ],
                    ("sign, lag", int(p1 != 0), 7),
                    ("sign, above", sign(u1), 7),
                )
                g = (16 * all_total + 16) // (all_count + 1)
                of_column, of_row = (
                    (16 * total[i] + 4 * g) // (count[i] + 4),
                    (16 * row_total + 4 * g) // (row_count + 4),
                )
                y = fine(of_column * of_row // g)
                z = 1 + level + 16 * agrees(predicted, negative) if predicted else 0
                if tree:
                    away = 1 + min(c >> 2, 3) + 4 * agrees(p1, negative) if c else 0
                    left = 1 + min(a >> 1, 15) + 16 * agrees(l1, negative) if a else 0
                    size = code_tree(mixer, negative, (away, y, z, left), csize)
                else:
                    signs = [(v != 0, agrees(v, negative)) for v in (l1, u1, p1)]
                    size = code_steps(
                        mixer, [(min(a, 3), min(b, 3)), near, min(c, 3), y, z, tuple(signs)], csize
                    )
                matrix[o, i] = wrap(-size if negative else size, 8)
                predictor.update(i, -log(size) if negative else log(size), predicted)
            all_seen, row_seen, seen[i] = all_seen + 1, row_seen + 1, seen[i] + 1
            all_count, row_count, count[i] = all_count + nonzero, row_count + nonzero, count[i] + nonzero
            all_total, row_total, total[i] = all_total + size, row_total + size, total[i] + size
            mean_size[i] += (256 * size - mean_size[i]) // min(seen[i], 16)
            row_size += (256 * size - row_size) // min(row_seen, 16)
        predictor.append_row(o)
    return matrix


def code_tree(mixer: Mixer, negative: int, known: tuple[int, ...], csize: int) -> int:
    node = 1
    for k in range(7):
        at = (negative, node)
        contexts = [*((f"t{n}", at, what) for n, what in enumerate(known)), ("t", at)]
        node = 2 * node + mixer.bit(contexts, ("tree, bit", k, 5), ("tree, size", csize, 5))
    return node - 128 + 1


def code_steps(mixer: Mixer, known: list[object], csize: int) -> int:
    size = 1
    while size < 128:
        k = min(size - 1, 15)
        contexts = [*((f"n{n}", k, what) for n, what in enumerate(known)), ("n", k)]
        if not mixer.bit(contexts, ("steps, step", k, 7), ("steps, size", csize, 7)):
            break
        size += 1
    return size
