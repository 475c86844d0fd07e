"""Adaptive rounding: learn whether each weight goes to the level below or above, by the error of outputs.

min_V  (q - w) H (q - w)^T + price * sum 1 - |2 h - 1|^beta      H [I, I] the second moment of inputs
q = (floor(w / s + z) + h - z) s      h = clamp(1.2 sigmoid(V) - 0.1, 0, 1): 0 is down, 1 is up
AdaRound (Nagel 2020, "Up or Down?"). beta falls, so that each h ends at 0 or 1. The error of outputs is a
quadratic form in the weights, so each gradient is that of all samples and nothing is drawn at random.
Then single weights change sides while that lowers the error. Another start of that are the codes of gptq
(compensation.py), cut to the two levels; each row takes what costs less. Unlike with gptq, no weight moves
further than to a level beside it.
cost    O * I * I for each of STEPS gradients
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tersor.maths.compensation import LEAST, OnGrid, Rows, better, descent, gptq
from tersor.maths.soft_rounding import GAMMA, ZETA, inverse, upward

STEPS = 200  # gradients; 500 lower the error of ResNet-20's layers by 0.1 dB more
RATE = 0.03  # of Adam
WARM = 0.2  # of the steps without the price
BETA = 20.0, 2.0  # at the beginning and the end of the rest
PRICE = 0.2  # of a weight between its levels; an error of half a step in one average input costs 0.25
EDGE = 0.01  # share of a step that a weight is away from a level at the start, so that it can move


def adapted(rows: Rows, base: OnGrid, grid: OnGrid, *, damp: float) -> tuple[OnGrid, int]:
    """(codes of adaround on the grids of `grid`, how many rows keep `base` because it costs less). With one
    scale for all, either all rows keep it or none. The cost is that of the samples, without `damp`."""
    made = better(rows, base, adaround(rows, grid, damp=damp))
    same = (made.codes == base.codes).all(-1) & (made.decode() == base.decode()).all(-1)
    return made, int((same & (rows.cost(base.decode()) > 0)).sum())


def beside(rows: Rows, grid: OnGrid) -> tuple[Tensor, Tensor]:
    """The codes below and above each weight, [G, O, I]; where the mask is False both are the code of 0."""
    low, high = grid.ends
    below = (rows.w / grid.step + grid.shift).floor_().clamp_(low, high - 1)
    if rows.keep is None:
        return below, below + 1
    return torch.where(rows.keep, below, grid.shift), torch.where(rows.keep, below + 1, grid.shift)


def adaround(rows: Rows, grid: OnGrid, *, damp: float) -> OnGrid:
    """Codes on the same grid, each the one below or above its weight. `damp`: fraction of the mean second
    moment added to each, for inputs that the data did not show."""
    below, above = beside(rows, grid)
    up = learned(rows, grid, below, above, damp=damp)
    starts = torch.where(up, above, below), gptq(rows, grid).codes.clamp(below, above)
    one, other = (descent(rows, replace(grid, codes=codes), (below, above)) for codes in starts)
    wins = rows.cost(other.decode()) < rows.cost(one.decode())
    return replace(one, codes=torch.where(wins[..., None], other.codes, one.codes))


def learned(rows: Rows, grid: OnGrid, below: Tensor, above: Tensor, *, damp: float) -> Tensor:
    """Where the code above is taken, bool [G, O, I]."""
    exact = rows.w / grid.step + grid.shift
    ratio = grid.step / grid.step.amax(-1, keepdim=True).clamp_min(LEAST)  # of a row's steps, with groups
    size = rows.moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(LEAST)
    moment = (rows.moment / size).float() + damp * torch.eye(rows.moment.shape[1], dtype=torch.float32)
    start = (exact - below).clamp(EDGE, 1 - EDGE)
    v = inverse(start)
    adam = torch.optim.Adam([v], lr=RATE)
    first = int(WARM * STEPS)
    for step in range(STEPS):
        sigmoid, h = v.sigmoid(), upward(v)
        gap = (torch.lerp(below, above, h) - exact) * ratio
        slope = 2 * (gap @ moment) * ratio * (above - below)
        if step >= first:
            beta = BETA[0] + (BETA[1] - BETA[0]) * (step - first) / (STEPS - first)
            side = 2 * h - 1
            slope -= 2 * PRICE * beta * side.abs().pow(beta - 1) * side.sign()
        free = (h > 0) & (h < 1)
        v.grad = slope * free * sigmoid * (1 - sigmoid) * (ZETA - GAMMA)
        adam.step()
    return v >= 0
