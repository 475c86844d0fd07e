"""Rate-distortion optimized quantization: codes that are worth their bits.

min tr(F E H E^T) + price * bits(codes)      E [O, I] = W - codes * step, F [O, O] and H [I, I] curvature
Column after column, row after row, each weight takes the level of least error + price * bits under an
adaptive model of its neighbors. What is left over is pushed to the weights still to come, exactly, by the
Cholesky factors of both inverses (OBS, Hassibi 1993; GPTQ, Frantar 2022; both sides: YAQA, Tseng 2025; with
the price of bits: CERWU, Conzelmann 2025). A step is wide where an error weighs little: step[o, i]^2 * a[o] *
b[i] is the same for all weights, a and b being what an error weighs once later weights have made up for it.
The loop sees weights near 1 and a weight of the error near 1, by powers of two, so that nothing in it leaves
float32. Cost: O * I * (O + I) / 2 multiplications, O^3 + I^3 for the factors.
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

DAMP = 1e-2  # of the mean diagonal, added to the diagonal: what the data did not show
TINY = 1e-100  # what an error weighs at least: where the data show nothing
WIDEST = 2.0**60  # a step over the largest weight: all codes are 0 long before
POWERS = 280  # prices keep to 2^-280 .. 2^280 in the loop, errors and prices of a caller to 2^-900 .. 2^900
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

    weight: Tensor  # [N] float64
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


def factor(moment: Tensor | None, count: int, *, damp: float = DAMP, who: str = "rdoq") -> Factor:
    """The factor of a second moment [N, N], of its diagonal [N], or of nothing: all weigh 1. RefusedError for
    a moment with NaN or infinity, or one that has no inverse."""
    if moment is None:
        return Factor(torch.ones(count, dtype=torch.float64))
    if not torch.isfinite(moment).all():
        raise RefusedError(
            f"{who}: what its error weighs is NaN or infinite: activations or gradients of the calibration "
            f"batches are beyond float32. Give weigh='none', or leave it out with where='!NAME'"
        )
    m = moment.double()
    if m.ndim == 1:
        return Factor(m.clamp_min(max(float(m.mean()) * damp * damp, TINY)))
    m = m + max(damp * float(m.diagonal().mean()), TINY) * torch.eye(count, dtype=torch.float64)
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(m)), upper=True)
    except torch.linalg.LinAlgError:
        raise RefusedError(
            f"{who}: the second moments of the data have no inverse with damp={damp:g}. Give a larger one"
        ) from None
    diagonal = upper.diagonal()
    return Factor(1 / diagonal.square(), (upper / diagonal[:, None]).float().contiguous())


def steps(rows: Factor, columns: Factor, price: float, per: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(row [O, 1], column [1, I]) of steps for a price; `per` "both", "channel", "input" or "tensor"."""
    size = scale * THETA * math.sqrt(price)
    own_row, own_column = per in ("both", "channel"), per in ("both", "input")
    row, column = (side.weight.double().rsqrt() for side in (rows, columns))
    row = row if own_row else row.log().mean().exp().reshape(1)
    column = column if own_column else column.log().mean().exp().reshape(1)
    # One side near 1, the other in units of weights: either alone may be beyond float32.
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
    """A power of two near the largest."""
    return 2.0 ** math.frexp(float(x.max()))[1]


def coarse(x: Tensor) -> Tensor:
    """To 3 significant bits: a step of its own is then cheap to store."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 8).round() / 8, exponent).float()


def rdoq(
    w: Tensor, rows: Factor, columns: Factor, price: float, *,
    row: Tensor, column: Tensor, keep: Tensor | None = None, limit: int = LIMIT, top: float = HUGE,
    who: str = "rdoq",
) -> Rounded:  # fmt: skip
    """Codes for w [O, I] on the grid of these steps. Where `keep` is False the code is 0, and the others make
    up for that too. `price`: of a bit, in units of the error. Steps are widened where codes would be beyond
    `limit`, or steps below the least normal float32. `top`: no decoded weight is larger."""
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
        targets *= free  # nothing makes up for what is hidden, however large it is
    row, column, begin = storable(row, column, targets, free, limit)
    # In units of 2^k, exactly: so the arithmetic below is the same for weights of any size.
    targets = shift(targets, torch.tensor(-k))
    tilt = power_of(row)
    high = (row / tilt).reshape(-1).expand(outs).contiguous().numpy()
    wide = (column.double() * (tilt * 2.0**-k)).float().reshape(-1).expand(ins).contiguous().numpy()
    (weigh_row, up), (weigh_column, across) = (evened(side.weight) for side in (rows, columns))
    unit = 2 * k + up + across  # the power of two that errors are counted in
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
            f"{who}: what rounding leaves over grows beyond float32 as it is pushed on: its second moments "
            f"have next to no inverse. Give a larger damp, or weigh='none'"
        )
    side = SIDE * (row.numel() * (row.numel() > 1) + column.numel() * (column.numel() > 1))
    found = below(torch.from_numpy(codes).T, row, column, top)
    return Rounded(found, row, column, times(float(state[4]), unit), float(state[3]) + side)


def check_shapes(  # noqa: PLR0917  all that the loop indexes
    w: Tensor, rows: Factor, columns: Factor, row: Tensor, column: Tensor, keep: Tensor | None, limit: int
) -> None:
    """Refuse what does not fit together: the compiled loop looks at no length but that of w."""
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
            raise SettingError(f"rdoq: {name} has shape {list(shape)} for weights of {[outs, ins]}")
    if keep is not None and keep.dtype != torch.bool:
        raise SettingError(f"rdoq: keep is {keep.dtype}, not a bool mask")
    if not 1 <= limit <= LIMIT:
        raise SettingError(f"rdoq: limit={limit}, but codes are int16: 1 to {LIMIT}")
    if not torch.isfinite(w).all():
        raise SettingError("rdoq: weights are NaN, or beyond float32. Repair the weights first")


def storable(
    row: Tensor, column: Tensor, targets: Tensor, free: Tensor, limit: int
) -> tuple[Tensor, Tensor, float]:
    """(row, column, mean code to begin with): steps that float32 holds with all their digits, and as wide as
    the largest of the weights [I, O] that are free needs for a code within the limit."""
    peak = float((targets.abs() * free).max())
    most = min(HUGE / 4, max(peak, SMALLEST) * WIDEST)
    row = row.clamp(SMALLEST, HUGE / 4)
    least, widest = SMALLEST / float(row.min()), most / float(row.max())
    column = column.double().nan_to_num(nan=math.inf).clamp(least, max(least, widest)).float()
    size = (targets.abs() / (column.T * row.T)).mul_(free)  # [I, O], 0 where it is hidden
    beyond = float(size.max()) / limit
    if beyond > 1:
        column, size = (column.double() * beyond).float(), size / beyond
    if not SMALLEST / 2 < float(row.min() * column.min()) <= float(row.max() * column.max()) < HUGE / 2:
        # Steps that differ by more than float32 spans: one for all.
        row, column = torch.ones(1, 1), torch.full((1, 1), max(peak / limit, SMALLEST))
        size = (targets.abs() / column).mul_(free)
    return row, column, float(size.clamp_(max=limit).round().mean())


def evened(weight: Tensor) -> tuple[np.ndarray, int]:
    """(weights of the error [N] float32, the largest near 1; the even power of two that they were in)."""
    power = math.frexp(float(weight.max()))[1] // 2 * 2
    return (weight.double() * 2.0**-power).clamp_min(SMALLEST).float().numpy(), power


def times(x: float, power: int, most: int = 900) -> float:
    """x * 2^power, never beyond 2^most, nor nearer to 0 than 2^-most."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(mantissa, max(-most, min(most, exponent + power)))


def below(codes: Tensor, row: Tensor, column: Tensor, top: float) -> Tensor:
    """The codes, smaller by what would decode to more than `top`: a weight near the end of float32, or of
    the 16 bits that it will be stored in, is rounded towards 0."""
    step = row.double() * column.double()
    if int(codes.abs().max()) * float(step.max()) <= top:
        return codes
    ends = (top * (1 - 1e-6) / step).clamp(max=LIMIT).floor().to(torch.int16)
    return torch.minimum(torch.maximum(codes, -ends), ends)


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
