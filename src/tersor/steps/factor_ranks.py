"""Factor ranks: the products that a weight may be stored as, their ranks, and the factors.

svd      w [O, I] ~ left [O, R] right [R, I], I with the kernel's positions                 Denton 2014
tucker   left [O, R], core [R, S, K], right [S, I]      a kernel of K positions             Kim 2016
cp       left [O, R], kernel [R, K], right [R, I]                                           Lebedev 2015
spatial  columns [O, R, W], rows [R, I, H]              a kernel of H x W positions         Jaderberg 2014
tt       tucker whose core is columns [R, M, W], rows [M, S, H]: a tensor train             Oseledets 2011
A kernel of one position, and a weight without a kernel, have only the first. Each returns the weight that the
factors stand for as a form from which model/convolution_factors.py finds them again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.forms import Dense, Form, LowRank
from tersor.maths.ranks import energies, rank_for_energy, rank_for_keep, svd_factors, whitened_factors
from tersor.maths.tensor_factors import as_columns, cp_factors, train_core, tucker_factors
from tersor.model.changes import Replace
from tersor.model.layer_macs import Reads
from tersor.model.sites import Site

METHODS = ("svd", "tucker", "cp", "spatial", "tt")
NAMES = {"tucker": "Tucker-2", "tt": "tensor train"}
HALVINGS = 50  # of the range of what directions leave out


class Factored(NamedTuple):
    """A weight as a product."""

    form: Form
    text: str  # the ranks
    changes: tuple[Replace, ...]  # one after another, if each factor is a layer


def method_for(method: str, w: Tensor, turned: bool) -> str:
    """The method, or "svd" where it does not differ from it. `turned`: the inputs are axis 0, as in
    transposed convolutions, which have no other factors."""
    kernel = w.shape[2:]
    if turned or math.prod(kernel) == 1:
        return "svd"
    if method in ("spatial", "tt") and (len(kernel) != 2 or 1 in kernel):
        return {"spatial": "svd", "tt": "tucker"}[method]
    return method


def ranks_for(step: Any, method: str, w: Tensor, tails: list[Tensor] | None = None) -> tuple[int, ...]:
    """The ranks by the step's rank, energy or keep; for tucker of the outputs and of the inputs, for tt also
    of the kernel's columns and rows. `tails`: the weight's spectra, if they are known."""
    if method == "tt":
        return train_ranks(step, w, tails)
    o, i = w.shape[:2]
    k = math.prod(w.shape[2:])
    share = 0.5 if step.keep is None else step.keep
    if method == "svd":
        return (aligned(step, one_rank(step, w.flatten(1)), min(o, i * k)),)
    if method == "spatial":
        h, wide = w.shape[2:]
        return (aligned(step, one_rank(step, as_columns(w)), min(o * wide, i * h)),)
    if method == "cp":
        # Of a CP no energy is known beforehand: that of the matrix is a lower bound of its rank.
        by_share = max(1, int(share * o * i * k / (o + i + k)))
        rank = one_rank(step, w.flatten(1)) if step.energy is not None else step.rank or by_share
        return (aligned(step, rank, max(1, o * i * k // (o + i + k))),)
    if step.rank is not None:
        found = step.rank, step.rank
    elif step.energy is not None:
        found = (
            rank_for_energy(w.flatten(1), step.energy),
            rank_for_energy(w.transpose(0, 1).flatten(1), step.energy),
        )
    else:
        part = tucker_part(o, i, k, share)
        found = max(1, int(part * o)), max(1, int(part * i))
    ins = min(aligned(step, found[1], i), i)
    most = min(o, ins * k)
    return min(aligned(step, found[0], most), most), ins


def train_ranks(step: Any, w: Tensor, tails: list[Tensor] | None) -> tuple[int, ...]:
    """(outputs, inputs, middle). For a share each leaves out as much of the energy: the least with which no
    more is stored."""
    o, i, h, wide = w.shape

    def fit(outs: int, ins: int, middle: int) -> tuple[int, ...]:
        ins = min(aligned(step, ins, i), i)
        most = min(o, ins * h * wide)
        outs = min(aligned(step, outs, most), most)
        most = min(outs * wide, ins * h)
        return outs, ins, min(aligned(step, middle, most), most)

    if step.rank is not None:
        return fit(step.rank, step.rank, step.rank)
    if step.energy is not None:
        outs, ins, middle = (rank_for_energy(rows, step.energy) for rows in unfolded(w))
        return fit(outs, ins, middle)
    tails = spectra("tt", w, None, turned=False) if tails is None else tails
    most = (0.5 if step.keep is None else step.keep) * w.numel()
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        bound = (low + high) / 2
        # A tail falls from 1 to 0: the rank is the number of its values above the bound.
        ranks = fit(*(max(1, int((tail > bound).sum())) for tail in tails))
        low, high = (low, bound) if stored("tt", w, ranks) <= most else (bound, high)
    return fit(*(max(1, int((tail > high).sum())) for tail in tails))


def spectra(method: str, w: Tensor, gram: Tensor | None, turned: bool) -> list[Tensor]:
    """For each rank of the method, at index r the share of the energy that r directions leave out; the error
    of Tucker and of a tensor train is at most the sum of all (De Lathauwer 2000, Oseledets 2011)."""
    rows = w.flatten(1)
    if method == "svd":
        return [left_out(rows.T, gram) if turned else left_out(rows, gram)]
    if method == "spatial":
        return [left_out(as_columns(w))]
    outs, *others = unfolded(w)
    return [left_out(outs, gram), *map(left_out, others[: 2 if method == "tt" else 1])]


def unfolded(w: Tensor) -> list[Tensor]:
    """The matrices of outputs, of inputs and, for a kernel of two axes, of columns and rows."""
    middle = [as_columns(w)] if w.ndim == 4 else []
    return [w.flatten(1), w.transpose(0, 1).flatten(1), *middle]


def left_out(rows: Tensor, gram: Tensor | None = None) -> Tensor:
    """The share of the energy without the first 0, 1, ... directions [min(O, I) + 1]."""
    return F.pad(energies(rows, gram).flip(0).cumsum(0).flip(0), (0, 1))


def one_rank(step: Any, rows: Tensor) -> int:
    if step.rank is not None:
        return int(step.rank)
    if step.energy is not None:
        return rank_for_energy(rows, step.energy)
    return rank_for_keep(rows.shape[0], rows.shape[1], 0.5 if step.keep is None else step.keep)


def aligned(step: Any, rank: int, most: int) -> int:
    """The nearest lower multiple that the step asks for, or the most there is. A rank that is asked for as
    such stays: if it is too large, it stores too much."""
    if step.multiple == 1:
        return max(1, rank if step.rank is not None else min(rank, most))
    return max(1, min(rank // step.multiple * step.multiple or step.multiple, most))


def stored(method: str, w: Tensor, ranks: tuple[int, ...]) -> int:
    """Numbers in the factors of a weight."""
    return round(work(method, w, ranks, Reads()))


def work(method: str, w: Tensor, ranks: tuple[int, ...], reads: Reads) -> float:
    """Multiply-accumulates of the factors for each position of the output. Factors before a stride, or
    without the kernel where nothing is padded, meet more positions."""
    o, i, *kernel = w.shape
    k, rank = math.prod(kernel), ranks[0]
    if method == "tucker":
        return rank * o + rank * ranks[1] * k + ranks[1] * i * reads.inputs
    if method == "tt":
        inner = ranks[2] * (ranks[1] * kernel[0] * reads.rows + rank * kernel[1])
        return rank * o + inner + ranks[1] * i * reads.inputs
    if method == "cp":
        return rank * (o + i * reads.inputs + k)
    if method == "spatial":
        return rank * (i * kernel[0] * reads.rows + o * kernel[1])
    return rank * (o + i * k)


def tucker_part(o: int, i: int, k: int, share: float) -> float:
    """p, so that ranks p O and p I keep this share: O^2 p + O I K p^2 + I^2 p = share O I K."""
    a, b, c = o * i * k, o * o + i * i, -share * o * i * k
    return min(1.0, (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))


def factored(method: str, w: Tensor, ranks: tuple[int, ...], gram: Tensor | None, site: Site) -> Factored:
    """The product of these ranks. `gram`: second moment of the layer's inputs."""
    layer, turned = site.layer, bool(site.axis)
    o, i, *kernel = w.shape
    rank = ranks[0]
    plain = "plain" if gram is None or method in ("cp", "spatial") else "whitened"
    if method == "svd":
        rows = w.flatten(1)
        if gram is not None and turned:
            right, left = (factor.T for factor in whitened_factors(rows.T, gram, rank))
        else:
            left, right = svd_factors(rows, rank) if gram is None else whitened_factors(rows, gram, rank)
        form = product(left, right.reshape(rank, *w.shape[1:]))
        text = f"rank {rank} of {min(rows.shape)}, {plain} SVD"
        return Factored(form, text, (Replace(layer, "product", {"layers": 2}),))
    if method in ("tucker", "tt"):
        left, core, inputs = tucker_factors(w.flatten(2), ranks[0], ranks[1], gram)
        changes = [Replace(layer, "tucker", {"rank": ranks[1]})]
        text = f"ranks {left.shape[1]} of {o} outputs and {ranks[1]} of {i} inputs"
        if method == "tt":
            left, core = train_core(left, core.unflatten(2, kernel), ranks[2])
            core = core.flatten(2)
            changes.append(Replace(f"{layer}.1".removeprefix("."), "spatial", {"rank": ranks[2]}))
            text += f", {ranks[2]} between columns and rows"
        right = torch.einsum("rsk,si->rik", core.double(), inputs.double()).to(w.dtype)
        form = product(left, right.reshape(-1, i, *kernel))
        return Factored(form, f"{text}, {plain} {NAMES[method]}", tuple(changes))
    if method == "cp":
        cp = cp_factors(w.flatten(2), rank)
        right = torch.einsum("ri,rk->rik", cp.right.double(), cp.kernel.double()).to(w.dtype)
        form = product(cp.left, right.reshape(rank, i, *kernel))
        return Factored(form, f"rank {rank}, CP", (Replace(layer, "cp", {"rank": rank}),))
    h, wide = kernel
    left, right = svd_factors(as_columns(w), rank)
    near = (left.double() @ right.double()).to(w.dtype).reshape(o, wide, i, h).permute(0, 2, 3, 1)
    text = f"rank {rank} of {min(o * wide, i * h)}, {h} x 1 and 1 x {wide}"
    return Factored(Dense(near.contiguous()), text, (Replace(layer, "spatial", {"rank": rank}),))


def product(left: Tensor, right: Tensor) -> LowRank:
    return LowRank(Dense(left.contiguous()), Dense(right.contiguous()))
