"""Learn: how columns foretell each other, from the second moments of the rows so far.

L D L' = moments / rows + ridge on the diagonal      L unit lower triangular, D diagonal
Cost: W^2 / 2 a row for the moments (grid_loops.py), W^3 / 6 for the elimination, W at most 257.
"""

from __future__ import annotations

import numpy as np

from tersor.coders.grid import COEF, STRONG


def learn(total: np.ndarray, rows: int, ridge: float) -> np.ndarray:
    """L [1 + W, 1 + W] int16 from second moments summed over `rows` rows.

    Elimination by outer products, each number by one multiplication and one subtraction, rounded as IEEE 754
    says: the same bits everywhere.
    """
    from tersor.coders import grid_loops

    a = total / rows
    width = len(a) - 1
    squares = 0.0
    for value in a.diagonal()[1:].tolist():  # one by one: numpy sums in an order of its own
        squares += value
    # The 1 keeps every pivot away from zero, also where a column never moved.
    shrink = ridge * width / rows * (squares / width) + 1.0
    for k in range(1, width + 1):
        a[k, k] += shrink
    grid_loops.eliminate(a)
    lower = np.rint(a * float(1 << COEF))
    return np.clip(lower, -STRONG, STRONG).astype(np.int16)
