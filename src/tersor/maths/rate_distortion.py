"""Rate-distortion optimized quantization: choose codes by squared error plus the price of their bits.

min tr(F E H E^T) + price * bits(codes)      E [O, I] = W - codes * step, F [O, O] and H [I, I] curvature

Column by column and row by row, each weight takes the level with the least error + price * bits, under an
adaptive model of its neighbors. Its rounding error is compensated in the weights that are not yet rounded,
with the Cholesky factors of both inverses (OBS, Hassibi 1993; GPTQ, Frantar 2022; both sides: YAQA, Tseng
2025; with the price of bits: CERWU, Conzelmann 2025). Steps are wider for errors of low weight:
step[o, i]^2 * a[o] * b[i] is constant, where a and b are the weights of an error after compensation. The loop
works on weights and error weights scaled to near 1 by powers of two, so that float32 does not overflow.
Cost: O * I * (O + I) / 2 multiplications, O^3 + I^3 for the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.errors import RefusedError, SettingError
from tersor.maths.units import HUGE, exponent, shift
from tersor.maths.units import TINY as SMALLEST

DAMP = 1e-2  # fraction of the mean diagonal added to the diagonal, for directions without data
TINY = 1e-100  # smallest weight of an error, for directions without data
WIDEST = 2.0**60  # largest ratio of a step and the largest weight: all codes are 0 long before
POWERS = (
    280  # prices are clipped to 2^-280 .. 2^280 in the loop; outside, errors and prices to 2^-900 .. 2^900
)
BLOCK = 64  # columns rounded before the others are updated by one matrix product
MAGNITUDES = 128
LARGEST = 64  # largest running magnitude with a context of its own
LIMIT = 32767
SIDE = 5.0  # approximate bits of a step in the file
# Step / sqrt(price). At high rates the optimum is where one bit less costs its price in error. The best value
# found is slightly larger, because at low rates the levels next to 0 are chosen less often.
THETA = 1.15 * math.sqrt(6 / math.log(2))


@dataclass(frozen=True)
class Factor:
    """One side of the curvature: weights of errors, and how an error is compensated in later weights."""

    weight: Tensor  # [N] float64
    push: Tensor | None = None  # [N, N] float32, unit upper triangular; None: no compensation


@dataclass(frozen=True)
class Rounded:
    """The result of rounding a weight matrix."""

    codes: Tensor  # int16 [O, I]
    row: Tensor  # row steps, float32 [O, 1] or [1, 1]
    column: Tensor  # column steps, [1, I] or [1, 1]; decoded = codes * row * column
    error: float  # tr(F E H E^T)
    bits: float  # of the codes under the adaptive model, plus an estimate for the steps

    def decode(self) -> Tensor:
        return self.codes * self.row * self.column


def factor(moment: Tensor | None, count: int, *, damp: float = DAMP, who: str = "rdoq") -> Factor:
    """The factor of a second moment [N, N], of its diagonal [N], or of None (all weights 1). RefusedError for
    a moment with NaN or infinity, or without an inverse."""
    if moment is None:
        return Factor(torch.ones(count, dtype=torch.float64))
    if not torch.isfinite(moment).all():
        raise RefusedError(
            f"{who}: the weights of its error are NaN or infinite, because activations or gradients of the "
            f"calibration batches overflow float32. Use weigh='none', or exclude the site with where='!NAME'"
        )
    m = moment.double()
    if m.ndim == 1:
        return Factor(m.clamp_min(max(float(m.mean()) * damp * damp, TINY)))
    m = m + max(damp * float(m.diagonal().mean()), TINY) * torch.eye(count, dtype=torch.float64)
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(m)), upper=True)
    except torch.linalg.LinAlgError:
        raise RefusedError(
            f"{who}: the second moments of the data have no inverse with damp={damp:g}. Use a larger damp"
        ) from None
    diagonal = upper.diagonal()
    return Factor(1 / diagonal.square(), (upper / diagonal[:, None]).float().contiguous())


def steps(rows: Factor, columns: Factor, price: float, per: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Steps (row [O, 1], column [1, I]) for a price. `per`: "both", "channel", "input" or "tensor"."""
    size = scale * THETA * math.sqrt(price)
    own_row, own_column = per in ("both", "channel"), per in ("both", "input")
    row, column = (side.weight.double().rsqrt() for side in (rows, columns))
    row = row if own_row else row.log().mean().exp().reshape(1)
    column = column if own_column else column.log().mean().exp().reshape(1)
    # One side is scaled to near 1, the other has the unit of weights, so that both fit in float32.
    if per == "channel":
        power = power_of(column)
        row, column = row * power * size, column / power
    else:
        power = power_of(row)
        row, column = row / power, column * power * size
    row = coarse(row) if own_row else row.float()
    column = coarse(column) if own_column else column.float()
    return row[:, None], column[None]


def power_of(x: Tensor) -> float:
    """A power of two near the largest element."""
    return 2.0 ** math.frexp(float(x.max()))[1]


def coarse(x: Tensor) -> Tensor:
    """Round to 3 significant bits, so that separate steps for each row or column are cheap to store."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 8).round() / 8, exponent).float()


def rdoq(
    w: Tensor, rows: Factor, columns: Factor, price: float, *,
    row: Tensor, column: Tensor, keep: Tensor | None = None, limit: int = LIMIT, top: float = HUGE,
    who: str = "rdoq",
) -> Rounded:  # fmt: skip
    """Round w [O, I] to codes on a grid with the given steps.

    `price`: price of a bit in units of the error. Codes with `keep` False are 0, which the other codes
    compensate for too. `limit`: largest |code|; steps are widened to meet it, and if they are below the
    smallest normal float32. `top`: largest decoded |weight|. SettingError for shapes or settings that do not
    fit, RefusedError if the compensation overflows.
    """
    from tersor.maths.rate_distortion_loop import FINE, LEFTS, refresh, sweep  # brings numba

    outs, ins = w.shape
    check_shapes(w, rows, columns, row, column, keep, limit)
    w = w.detach().float()
    if not w.numel():
        return Rounded(torch.zeros((outs, ins), dtype=torch.int16), row, column, 0.0, 0.0)
    k = int(exponent(w.reshape(1, -1)))
    targets = w.T.contiguous().clone()  # [I, O]
    free = torch.ones_like(targets, dtype=torch.bool) if keep is None else keep.T.contiguous()
    if keep is not None and rows.push is None and columns.push is None:
        targets *= free  # without compensation, masked weights are ignored, however large
    row, column, begin = storable(row, column, targets, free, limit)
    # In exact units of 2^k, so that the arithmetic below does not depend on the scale of the weights.
    targets = shift(targets, torch.tensor(-k))
    tilt = power_of(row)
    high = (row / tilt).reshape(-1).expand(outs).contiguous().numpy()
    wide = (column.double() * (tilt * 2.0**-k)).float().reshape(-1).expand(ins).contiguous().numpy()
    (weigh_row, up), (weigh_column, across) = (evened(side.weight) for side in (rows, columns))
    unit = 2 * k + up + across  # errors in the loop are in units of 2^unit
    codes = np.zeros((ins, outs), np.int16)
    down = (torch.zeros(0, 0) if rows.push is None else rows.push).numpy()
    levels, counts = contexts(FINE, LEFTS)
    cost = np.zeros(counts.shape, np.float32)
    seen = np.ones(len(counts), np.bool_)
    refresh(counts, cost, seen)
    state = np.array([begin, 0.0, 512.0, 0.0, 0.0])
    running = np.full(outs, begin, np.float32)
    left = np.zeros(outs, np.int16)
    paid = times(price, -unit, POWERS)
    for a in range(0, ins, BLOCK):
        b = min(a + BLOCK, ins)
        block = targets[a:b].contiguous()
        push = torch.eye(b - a) if columns.push is None else columns.push[a:b, a:b].contiguous()
        sweep(
            block.numpy(), free.numpy()[a:b], codes[a:b], push.numpy(), weigh_column[a:b], wide[a:b], down,
            weigh_row, high, paid, limit, left, counts, cost, running, levels, seen, state,
        )  # fmt: skip
        if columns.push is not None and b < ins:
            targets[b:] -= columns.push[a:b, b:].T @ block
    if not math.isfinite(state[4]):
        raise RefusedError(
            f"{who}: compensating rounding errors overflows float32, because its second moments are nearly "
            f"singular. Use a larger damp, or weigh='none'"
        )
    side = SIDE * (row.numel() * (row.numel() > 1) + column.numel() * (column.numel() > 1))
    found = below(torch.from_numpy(codes).T, row, column, top)
    return Rounded(found, row, column, times(float(state[4]), unit), float(state[3]) + side)


def check_shapes(  # noqa: PLR0917  all arrays that the loop indexes
    w: Tensor, rows: Factor, columns: Factor, row: Tensor, column: Tensor, keep: Tensor | None, limit: int
) -> None:
    """Refuse arrays of the wrong shape: the compiled loop only checks the shape of w."""
    outs, ins = w.shape
    found: list[tuple[str, tuple[int, ...], set[tuple[int, ...]]]] = [
        ("rows", rows.weight.shape, {(outs,)}), ("columns", columns.weight.shape, {(ins,)}),
        ("row", row.shape, {(outs, 1), (1, 1)}), ("column", column.shape, {(1, ins), (1, 1)}),
        ("keep", (outs, ins) if keep is None else keep.shape, {(outs, ins)}),
    ]  # fmt: skip
    found += [
        (f"push of {name}", side.push.shape, {(count, count)})
        for name, side, count in (("rows", rows, outs), ("columns", columns, ins))
        if side.push is not None
    ]
    for name, shape, allowed in found:
        if tuple(shape) not in allowed:
            raise SettingError(
                f"rdoq: {name} has shape {list(shape)}, which does not fit weights of {[outs, ins]}"
            )
    if keep is not None and keep.dtype != torch.bool:
        raise SettingError(f"rdoq: keep is {keep.dtype}, but must be a bool mask")
    if not 1 <= limit <= LIMIT:
        raise SettingError(f"rdoq: limit={limit}, but codes are int16, so it is 1 to {LIMIT}")
    if not torch.isfinite(w).all():
        raise SettingError("rdoq: some weights are NaN or beyond float32. Repair the weights first")


def storable(
    row: Tensor, column: Tensor, targets: Tensor, free: Tensor, limit: int
) -> tuple[Tensor, Tensor, float]:
    """(row, column, mean |code|): steps that are normal float32 numbers, and wide enough that the largest
    unmasked weight [I, O] has a code within the limit. The mean |code| initializes the model."""
    peak = float((targets.abs() * free).max())
    most = min(HUGE / 4, max(peak, SMALLEST) * WIDEST)
    row = row.clamp(SMALLEST, HUGE / 4)
    least, widest = SMALLEST / float(row.min()), most / float(row.max())
    column = column.double().nan_to_num(nan=math.inf).clamp(least, max(least, widest)).float()
    size = (targets.abs() / (column.T * row.T)).mul_(free)  # [I, O], 0 for masked weights
    beyond = float(size.max()) / limit
    if beyond > 1:
        column, size = (column.double() * beyond).float(), size / beyond
    if not SMALLEST / 2 < float(row.min() * column.min()) <= float(row.max() * column.max()) < HUGE / 2:
        # The steps differ by more than the range of float32: use one step for all.
        row, column = torch.ones(1, 1), torch.full((1, 1), max(peak / limit, SMALLEST))
        size = (targets.abs() / column).mul_(free)
    return row, column, float(size.clamp_(max=limit).round().mean())


def evened(weight: Tensor) -> tuple[np.ndarray, int]:
    """(weights of the error [N] float32, scaled so that the largest is near 1; log2 of the scale, even)."""
    power = math.frexp(float(weight.max()))[1] // 2 * 2
    return (weight.double() * 2.0**-power).clamp_min(SMALLEST).float().numpy(), power


def times(x: float, power: int, most: int = 900) -> float:
    """x * 2^power, clipped to about 2^-most .. 2^most."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(mantissa, max(-most, min(most, exponent + power)))


def below(codes: Tensor, row: Tensor, column: Tensor, top: float) -> Tensor:
    """Clip the codes so that no decoded |weight| is above `top`: the largest number of float32, or of the
    16-bit dtype that the weights are stored in."""
    step = row.double() * column.double()
    if int(codes.abs().max()) * float(step.max()) <= top:
        return codes
    ends = (top * (1 - 1e-6) / step).clamp(max=LIMIT).floor().to(torch.int16)
    return torch.minimum(torch.maximum(codes, -ends), ends)


def contexts(fine: int, lefts: int) -> tuple[np.ndarray, np.ndarray]:
    """(level of each running magnitude, initial counts): each context starts with the geometric distribution
    of its magnitude, with the weight of a few codes."""
    magnitude = np.arange(fine * LARGEST) / fine
    levels = np.floor(4 * np.log2(1 + 4 * magnitude)).astype(np.int16)
    count = int(levels[-1]) + 1
    center = np.maximum((2 ** ((np.arange(count) + 0.5) / 4) - 1) / 4, 0.02)
    ratio = (center / (1 + center))[:, None]
    counts = 8 * (1 - ratio) * ratio ** np.arange(MAGNITUDES) + 1e-4
    return levels, np.repeat(counts, lefts, axis=0)
