"""Ranks: low-rank factorization of a weight matrix.

W [O, I] ~ left [O, R] right [R, I]           stored  R * (O + I) numbers instead of O * I
plain       best in |W - LR|                  truncated SVD: Eckart, Young 1936
whitened    best in E |(W - LR) x|^2          x with second moment C = A A^T: the SVD of W A gives U, and
            L = U, R = U^T W                  Chen et al. 2021 (DRONE), Wang et al. 2024 (SVD-LLM)

No inverse of A is needed, so rank-deficient moments are allowed. Each factor gets the square roots of the
singular values: with equal norms, both quantize and train equally well.
cost  O(O * I * min(O, I)), and O(O * I^2) for the moment, in float64
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import SettingError

DAMP = 1e-9  # weight of directions without data, relative to the mean: there LR approximates W itself


def svd_factors(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]) in w's dtype: the truncated SVD. SettingError for a bad shape or rank."""
    _check("svd_factors", w, rank)
    u, d, v = torch.linalg.svd(w.detach().double(), full_matrices=False)
    return _balanced(u, d, v, rank, w.dtype)


def whitened_factors(w: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]) in w's dtype, for inputs x with gram [I, I] = E[x x^T], in any scale.

    SettingError for a bad shape, rank or gram.
    """
    _check("whitened_factors", w, rank)
    w64 = w.detach().double()
    if len(w64) <= w64.shape[1]:  # the left singular vectors of W A, without A
        u = torch.linalg.eigh(output_moment(w64, damped(gram, w.shape[1]))).eigenvectors.flip(1)[
            :, :rank
        ]  # [O, R]
    else:
        u = torch.linalg.svd(w64 @ root_of(gram, w.shape[1]), full_matrices=False).U[:, :rank]
    p, d, q = torch.linalg.svd(u.T @ w64, full_matrices=False)  # [R, R], [R], [R, I]
    return _balanced(u @ p, d, q, rank, w.dtype)


def rank_for_energy(w: Tensor, energy: float) -> int:
    """The lowest rank that keeps this share of the sum of squares."""
    if not 0 < energy <= 1:
        raise SettingError(
            f"rank_for_energy: energy={energy}, but it is the share of |W|^2 kept: 0 < energy <= 1"
        )
    _check("rank_for_energy", w, 1)
    values = torch.linalg.svdvals(w.detach().double())
    values = values / values[0].clamp_min(torch.finfo(torch.float64).tiny)
    kept = values.square().cumsum(0)
    # The last digits of a sum are rounding noise: without slack, energy=1 would keep empty ranks.
    return min(len(values), 1 + int((kept < kept[-1] * (energy - 1e-13)).sum()))


def energies(w: Tensor, gram: Tensor | None = None) -> Tensor:
    """The share of E |W x|^2 in each direction, from the largest on [min(O, I)] in float64; without a gram of
    |W|^2. Zeros for a weight without energy. SettingError for a bad shape or gram."""
    _check("energies", w, 1)
    w64 = w.detach().double()
    w64 = w64 / w64.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    # Eigenvalues of the smaller of both products: the squared singular values, to a rounding of the largest.
    if len(w64) <= w64.shape[1]:
        square = output_moment(w64, None if gram is None else damped(gram, w64.shape[1]))
    else:
        square = output_moment((w64 if gram is None else w64 @ root_of(gram, w64.shape[1])).T)
    found = torch.linalg.eigvalsh(square).flip(0).clamp_min(0)
    return found / found.sum().clamp_min(torch.finfo(torch.float64).tiny)


def output_moment(rows: Tensor, moment: Tensor | None = None) -> Tensor:
    """E y y^T [O, O] of y = rows x, E x x^T the moment, or the identity; symmetric to the last bit."""
    square = (rows if moment is None else rows @ moment) @ rows.T
    return (square + square.T) / 2


def rank_for_keep(o: int, i: int, keep: float) -> int:
    """The largest rank with R * (O + I) <= keep * O * I, at least 1."""
    if not 0 < keep <= 1:
        raise SettingError(
            f"rank_for_keep: keep={keep}, but it is the share of parameters kept: 0 < keep <= 1"
        )
    budget = keep * o * i
    rank = int(budget / (o + i)) + 1
    while rank > 1 and rank * (o + i) > budget * (1 + 1e-12):
        rank -= 1
    return rank


def energy_error(w: Tensor, left: Tensor, right: Tensor, gram: Tensor | None = None) -> float:
    """|W - LR|^2 / |W|^2, or with a gram E |(W - LR) x|^2 / E |W x|^2. 0 / 0 is 0."""
    w64 = w.detach().double()
    gap = w64 - left.detach().double() @ right.detach().double()
    if gram is None:
        lost, whole = gap.square().sum(), w64.square().sum()
    else:
        c = gram.detach().double()
        lost, whole = ((gap @ c) * gap).sum(), ((w64 @ c) * w64).sum()
    if float(lost) <= 0:
        return 0.0
    return float(lost / whole) if float(whole) > 0 else float("inf")


def _balanced(u: Tensor, d: Tensor, v: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = d[:rank].sqrt()
    return (u[:, :rank] * half).to(dtype).contiguous(), (half[:, None] * v[:rank]).to(dtype).contiguous()


def root_of(gram: Tensor, columns: int) -> Tensor:
    """A [I, I] with A A^T = gram, slightly damped. SettingError for a gram that is none of `columns`."""
    values, vectors = torch.linalg.eigh(damped(gram, columns))
    return vectors * values.clamp_min(0).sqrt()


def damped(gram: Tensor, columns: int) -> Tensor:
    """The gram over its mean, in float64, with a little of the identity; the identity if it is zero.
    SettingError for a gram that is none of `columns`."""
    if gram.shape != (columns, columns) or not bool(torch.isfinite(gram).all()):
        raise SettingError(
            f"gram: it has shape {list(gram.shape)} or is not finite, but it is E[x x^T] of the inputs, "
            f"[{columns}, {columns}]"
        )
    c = gram.detach().double()
    c = (c + c.T) / 2
    mean = float(c.diagonal().mean())
    c = c / mean if mean > 0 else torch.zeros_like(c)
    c.diagonal().add_(DAMP if mean > 0 else 1.0)
    return c


def _check(who: str, w: Tensor, rank: int) -> None:
    if w.ndim != 2 or 0 in w.shape or not bool(torch.isfinite(w).all()):
        raise SettingError(
            f"{who}: got a tensor of shape {list(w.shape)}, but a weight must be [O, I] and finite"
        )
    if not 1 <= rank <= min(w.shape):
        raise SettingError(f"{who}: rank={rank}, but {list(w.shape)} allows ranks 1 to {min(w.shape)}")
