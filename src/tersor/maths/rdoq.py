"""Rate-distortion optimized quantization: codes that are worth their bits.

min tr(F E H E^T) + price * bits(codes)      E [O, I] = W - codes * step, F [O, O] and H [I, I] curvature
Column after column, row after row, each weight takes the level of least error + price * bits under an
adaptive model of its neighbors. What is left over is pushed to the weights still to come, exactly, by the
Cholesky factors of both inverses (OBS, Hassibi 1993; GPTQ, Frantar 2022; both sides: YAQA, Tseng 2025; with
the price of bits: CERWU, Conzelmann 2025). A step is wide where an error weighs little: step[o, i]^2 * a[o] *
b[i] is the same for all weights, a and b being what an error weighs once later weights have made up for it.
Cost: O * I * (O + I) / 2 multiplications, O^3 + I^3 for the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DAMP = 1e-2  # of the mean diagonal, added to the diagonal: what the data did not show
TINY = 1e-30
BLOCK = 64  # columns rounded before the rest is updated in one product
MAGNITUDES = 128
LARGEST = 64  # running magnitudes told apart
LIMIT = 32767
SIDE = 5.0  # bits of a step in the file, about
# Step over sqrt(price): where bits are many the error grows by the price of each bit less; found best a bit
# above that, because where they are few the levels beside 0 are chosen less often.
THETA = 1.15 * math.sqrt(6 / math.log(2))


@dataclass(frozen=True)
class Factor:
    """One side of the curvature: what an error weighs, and what it takes from the weights that follow."""

    weight: Tensor  # [N] float32
    push: Tensor | None = (
        None  # [N, N] float32, upper triangle with a diagonal of ones; None: nothing follows
    )


@dataclass(frozen=True)
class Rounded:
    """What rounding one weight gave."""

    codes: Tensor  # int16 [O, I]
    row: Tensor  # step by row, float32 [O, 1] or [1, 1]
    column: Tensor  # step by column, [1, I] or [1, 1]; a weight is codes * row * column
    error: float  # tr(F E H E^T)
    bits: float  # of the codes under the adaptive model, with about what the steps take

    def decode(self) -> Tensor:
        return self.codes * self.row * self.column


def factor(moment: Tensor | None, count: int, *, damp: float = DAMP) -> Factor:
    """The factor of a second moment [N, N], of its diagonal [N], or of nothing: all weigh 1."""
    if moment is None:
        return Factor(torch.ones(count))
    if moment.ndim == 1:
        floor = float(moment.mean()) * damp * damp
        return Factor(moment.float().clamp_min(max(floor, TINY)))
    m = moment.double()
    m = m + (damp * float(m.diagonal().mean()) + TINY) * torch.eye(count, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(m)), upper=True)
    diagonal = upper.diagonal()
    return Factor((1 / diagonal.square()).float(), (upper / diagonal[:, None]).float().contiguous())


def steps(rows: Factor, columns: Factor, price: float, per: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(row [O, 1], column [1, I]) of steps for a price; `per` "both", "row", "column" or "tensor"."""
    size = scale * THETA * math.sqrt(price)
    own_row, own_column = per in ("both", "row"), per in ("both", "column")
    row, column = (side.weight.double().rsqrt() for side in (rows, columns))
    row = row if own_row else row.log().mean().exp().reshape(1)
    column = column if own_column else column.log().mean().exp().reshape(1)
    if per == "row":
        row, size = row * size, 1.0
    row, column = coarse(row) if own_row else row.float(), column * size
    column = coarse(column) if own_column else column.float()
    return row[:, None], column[None]


def coarse(x: Tensor) -> Tensor:
    """To 3 significant bits: a step of its own is then cheap to store."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 8).round() / 8, exponent).float()


def rdoq(
    w: Tensor, rows: Factor, columns: Factor, price: float, *,
    row: Tensor, column: Tensor, keep: Tensor | None = None, limit: int = LIMIT,
) -> Rounded:  # fmt: skip
    """Codes for w [O, I] on the grid of these steps. Where `keep` is False the code is 0, and the others make
    up for that too. `price`: of a bit, in units of the error."""
    from tersor.maths.rdoq_loop import FINE, LEFTS, refresh, sweep  # brings numba

    outs, ins = w.shape
    targets = w.detach().float().T.contiguous().clone()  # [I, O]
    free = (torch.ones_like(targets, dtype=torch.bool) if keep is None else keep.T.contiguous()).numpy()
    codes = np.zeros((ins, outs), np.int16)
    wide = column.reshape(-1).expand(ins).contiguous().numpy()
    high = row.reshape(-1).expand(outs).contiguous().numpy()
    down = (torch.zeros(0, 0) if rows.push is None else rows.push).numpy()
    levels, counts = contexts(FINE, LEFTS)
    cost = np.zeros(counts.shape, np.float32)
    seen = np.ones(len(counts), np.bool_)
    refresh(counts, cost, seen)
    begin = float((targets.abs() / (torch.from_numpy(wide)[:, None] * torch.from_numpy(high))).round().mean())
    state = np.array([begin, 0.0, 512.0, 0.0, 0.0])
    running = np.full(outs, begin, np.float32)
    left = np.zeros(outs, np.int16)
    weight = columns.weight.numpy()
    for a in range(0, ins, BLOCK):
        b = min(a + BLOCK, ins)
        block = targets[a:b].contiguous()
        push = torch.eye(b - a) if columns.push is None else columns.push[a:b, a:b].contiguous()
        sweep(
            block.numpy(), free[a:b], codes[a:b], push.numpy(), weight[a:b], wide[a:b], down,
            rows.weight.numpy(), high, price, limit, left, counts, cost, running, levels, seen, state,
        )  # fmt: skip
        if columns.push is not None and b < ins:
            targets[b:] -= columns.push[a:b, b:].T @ block
    side = SIDE * (row.numel() * (row.numel() > 1) + column.numel() * (column.numel() > 1))
    return Rounded(torch.from_numpy(codes).T, row, column, float(state[4]), float(state[3]) + side)


def contexts(fine: int, lefts: int) -> tuple[np.ndarray, np.ndarray]:
    """(level of a running magnitude, counts to begin with): each context begins as the geometric
    distribution of its magnitude, worth a few weights."""
    magnitude = np.arange(fine * LARGEST) / fine
    levels = np.floor(4 * np.log2(1 + 4 * magnitude)).astype(np.int16)
    count = int(levels[-1]) + 1
    center = np.maximum((2 ** ((np.arange(count) + 0.5) / 4) - 1) / 4, 0.02)
    ratio = (center / (1 + center))[:, None]
    counts = 8 * (1 - ratio) * ratio ** np.arange(MAGNITUDES) + 1e-4
    return levels, np.repeat(counts, lefts, axis=0)
