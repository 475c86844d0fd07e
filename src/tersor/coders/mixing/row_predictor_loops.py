"""Mixing, the votes: rows that were like this one so far foretell the rest of it. Integers only.

vote of row r on column i = trust[r] * said[r, i]      said: the sign of a code and its length in bits
    trust is learned along a row, and anew for each: normalized least mean squares (Widrow, Hoff 1960)
    error = said - sum of votes / 2,   trust[r] += error * said[r, i] / (100 + sum of said^2)
Weight matrices lie near few directions, and so do the signs of what pruning leaves. Only rows whose code
in the column is not zero have a say, the last VOTERS of them, so sparse matrices pay little.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

VOTERS = 256  # rows that have a say in a column
RIDGE = 100  # squares of codes that trust is slowed by
MOST = 1 << 20  # of trust, which has 16 bits after the point


@njit(forceinline=True)
def hear(i, voters, said, heard, trust):
    """The sum of the votes on column i, 12 bits after the point, and the sum of their squares."""
    total = squares = np.int64(0)
    for k in range(min(heard[i], VOTERS)):
        vote = (trust[voters[i, k]] * said[i, k]) >> 4
        total += vote
        squares += vote * vote
    return total, squares


@njit
def learn(word, total, i, voters, said, heard, trust):
    """Trust those who said of column i what came true."""
    n = min(heard[i], VOTERS)
    mass = np.int64(RIDGE)
    for k in range(n):
        mass += np.int64(said[i, k]) * said[i, k]
    step = ((word << 16) - 8 * total) // mass
    for k in range(n):
        r = voters[i, k]
        trust[r] = min(max(trust[r] + step * said[i, k], -MOST), MOST)


@njit
def end_row(o, words, voters, said, heard, trust):
    """Forget the trusts of row o, whose words are given; its words are heard from now on."""
    for i in range(words.size):
        if words[i] != 0:
            for k in range(min(heard[i], VOTERS)):
                trust[voters[i, k]] = 0
            place = heard[i] % VOTERS
            voters[i, place] = o
            said[i, place] = words[i]
            heard[i] += 1
            words[i] = 0
