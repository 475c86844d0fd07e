"""Tensor factors: products for the kernel of a convolution, W [O, I, K]; K are the kernel's positions.

tucker   W ~ left core right: left [O, R], core [R, S, K], right [S, I]; R and S are the ranks of outputs
         and inputs                                                    Tucker 1966; Kim et al. 2016 (Tucker-2)
train    Tucker whose core, a kernel of H x W positions, is columns [R, M, W] rows [M, S, H]; M is the middle
         rank                                                          Oseledets 2011 (tensor train)
cp       W ~ sum_r left[:, r] (x) right[r] (x) kernel[r]                Hitchcock 1927; Lebedev et al. 2015
Tucker takes the second moment of the inputs, [I K, I K], and then has the least error of the outputs for the
input factor that it chose. CP is found by alternating least squares, from a start that holds no randomness.
cost     tucker O(O (I K)^2), cp O(ROUNDS R O I K); both in float64
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.ranks import damped, root_of, svd_factors, whitened_factors

ROUNDS = 100  # of alternating least squares, at most
STILL = 1e-5  # relative gain of a round below which it ends
RIDGE = 1e-6  # relative: keeps components from growing against each other (de Silva, Lim 2008)
TURNS = 3  # input factors that are chosen anew for the outputs kept


class Cp(NamedTuple):
    """W[o, i, k] ~ sum over r of left[o, r] right[r, i] kernel[r, k]."""

    left: Tensor  # [O, R]
    right: Tensor  # [R, I]
    kernel: Tensor  # [R, K]


def tucker_factors(
    w: Tensor, outs: int, ins: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(left [O, outs], core [outs, ins, K], right [ins, I]) in w's dtype. `gram`: E[x x^T] of the inputs
    [I K, I K], in any scale. SettingError for a bad shape, rank or gram."""
    check(w, outs, w.shape[0])
    check(w, ins, w.shape[1])
    o, i, k = w.shape
    w64 = w.detach().double()
    moment = None if gram is None else damped(gram, i * k)
    by_input = None if moment is None else root_of(channels(moment, i, k), i)
    left, core, right = w64, w64, w64
    kept = w64
    for _ in range(TURNS):
        right = input_basis(kept, by_input, ins)
        wide = torch.kron(right.contiguous(), torch.eye(k, dtype=torch.float64))  # [S K, I K]
        flat = w64.flatten(1)
        if moment is None:
            left, core = svd_factors(flat @ wide.T, min(outs, ins * k))
        else:
            inner = wide @ moment @ wide.T
            best = torch.linalg.solve(inner, wide @ moment @ flat.T).T
            left, core = whitened_factors(best, inner, min(outs, ins * k))
        basis = torch.linalg.qr(left).Q
        kept = (basis.T @ flat).reshape(-1, i, k)
    return (
        left.to(w.dtype).contiguous(),
        core.reshape(-1, ins, k).to(w.dtype).contiguous(),
        right.to(w.dtype).contiguous(),
    )


def train_core(left: Tensor, core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [O, R], core [R, S, H, W]), the product nearest to the given one of all whose core has this rank
    as a matrix [(R, W), (S, H)]. The new left has orthonormal columns. SettingError for a bad rank."""
    r, s, h, wide = core.shape
    basis, mix = torch.linalg.qr(left.double())
    rows = as_columns(torch.einsum("qr,rshw->qshw", mix, core.double()))
    columns, lines = svd_factors(rows, rank)
    near = (columns @ lines).reshape(r, wide, s, h).permute(0, 2, 3, 1)
    return basis.to(left.dtype), near.to(core.dtype).contiguous()


def as_columns(w: Tensor) -> Tensor:
    """[(O, W), (I, H)] of a kernel [O, I, H, W]."""
    o, i, h, wide = w.shape
    return w.permute(0, 3, 1, 2).reshape(o * wide, i * h)


def input_basis(w: Tensor, root: Tensor | None, rank: int) -> Tensor:
    """[rank, I], orthonormal rows: the inputs that matter most for w [O, I, K], weighed by their moment."""
    rows = w.transpose(1, 2).flatten(0, 1)  # [O K, I]
    u, d, v = torch.linalg.svd(rows if root is None else rows @ root, full_matrices=False)
    if root is None:
        return v[:rank]
    # Of (rows root) = u d v, the first ranks are u d (v root^-1) x: their rows span u^T rows.
    return torch.linalg.qr((u[:, :rank].T @ rows).T).Q.T


def channels(moment: Tensor, i: int, k: int) -> Tensor:
    """[I, I]: the second moment of the input channels, summed over the kernel's positions."""
    return torch.einsum("akbk->ab", moment.reshape(i, k, i, k))


def cp_factors(w: Tensor, rank: int) -> Cp:
    """The factors of w [O, I, K] in its dtype, of equal norms. SettingError for a bad shape or rank."""
    check(w, rank, rank)
    o, i, k = w.shape
    w64 = w.detach().double()
    size = float(w64.square().sum()) or 1.0
    unfolded = [w64.flatten(1), w64.transpose(0, 1).flatten(1), w64.movedim(2, 0).flatten(1)]
    factors = [start(rows, rank) for rows in unfolded]  # [O, R], [I, R], [K, R]
    last = torch.inf
    for _ in range(ROUNDS):
        for at, rows in enumerate(unfolded):
            a, b = (factor for other, factor in enumerate(factors) if other != at)
            normal = (a.T @ a) * (b.T @ b)
            normal.diagonal().add_(RIDGE * float(normal.diagonal().mean()) + 1e-30)
            mixed = torch.einsum("ar,br->abr", a, b).flatten(0, 1)
            against = rows @ mixed
            factors[at] = torch.linalg.solve(normal, against.T).T
            norms = factors[at].norm(dim=0).clamp_min(1e-30)
            if at < 2:
                factors[at] = factors[at] / norms
        first, second, third = (factor.T @ factor for factor in factors)
        product = float((first * second * third).sum())  # its sum of squares
        error = (size - 2 * float((against * factors[2]).sum()) + product) / size
        if last - error < STILL * max(error, 1e-12):
            break
        last = error
    norms = factors[2].norm(dim=0)
    cube = norms.clamp_min(1e-30) ** (1 / 3)
    left, right, kernel = factors[0] * cube, factors[1] * cube, factors[2] / cube**2
    return Cp(
        left.to(w.dtype).contiguous(), right.T.to(w.dtype).contiguous(), kernel.T.to(w.dtype).contiguous()
    )


def start(rows: Tensor, rank: int) -> Tensor:
    """The first factor of an axis: its singular vectors; beyond their number, cosines of their own."""
    u = torch.linalg.svd(rows, full_matrices=False).U[:, :rank]
    more = rank - u.shape[1]
    if more <= 0:
        return u
    at = torch.arange(len(rows), dtype=torch.float64)[:, None] + 0.5
    waves = torch.cos(torch.pi * at * torch.arange(1, more + 1, dtype=torch.float64) * 0.61803398875)
    return torch.cat([u, waves / waves.norm(dim=0).clamp_min(1e-30)], 1)


def check(w: Tensor, rank: int, most: int) -> None:
    if w.ndim != 3 or 0 in w.shape or not bool(torch.isfinite(w).all()):
        raise SettingError(
            f"factors: got a tensor of shape {list(w.shape)}, but a kernel must be [O, I, K] and finite"
        )
    if not 1 <= rank <= most:
        raise SettingError(f"factors: rank={rank}, but {list(w.shape)} allows ranks 1 to {most}")
