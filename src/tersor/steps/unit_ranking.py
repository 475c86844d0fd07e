"""Unit ranking: the order in which the units of each family go, and the damage that it does, by a criterion.

redundancy   what the layers that read a unit cannot rebuild from the others    maths/unit_removal.py
curvature    E |dy|^2 by a unit's weights, second order                          model/curvature.py
taylor       first order, of the task's loss; it and the rest:                   maths/unit_scores.py
The first three are in units of the output and compare between families; the others are scaled to a mean of 1.
Where a criterion says nothing about a family (no layer that reads it can be observed), curvature takes over.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tersor.core.view import View
from tersor.errors import RefusedError
from tersor.forms.form import from_rows, to_rows
from tersor.maths.unit_removal import Reader, removal
from tersor.maths.unit_scores import by_unit, in_order, median_scores, norm_scores, reading_scores
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.channels.groups import Family
from tersor.model.curvature import curvatures
from tersor.model.sites import Site

WIDEST = 6144  # inputs of a layer for redundancy: an inverse of this size takes seconds
GRADIENTS = 16  # training batches for taylor
Slice = tuple[Tensor, int, Tensor]  # weight, axis, index [U, K]


class Ranking(NamedTuple):
    """By family name: components of units, from the least important, and the damage after n removals."""

    order: dict[str, np.ndarray[Any, Any]]
    damage: dict[str, Tensor]  # [U + 1]


def rank(by: str, view: View, families: Sequence[Family]) -> Ranking:
    found, missing = BY[by](view, families), []
    orders, damages = {}, {}
    for family in families:
        if family.name not in found:
            missing.append(family)
    if missing:
        found |= curvature(view, missing)
    for family in families:
        order, damage = found[family.name]
        if not damage.isfinite().all():
            raise RefusedError(
                f"slim: the importance of {family.name} is NaN or infinite with by={by!r}: the model's "
                "activations or gradients overflow float32 on the task's batches. Give by='l2', which looks "
                "at weights alone, or leave the layer out by where"
            )
        orders[family.name], damages[family.name] = family.units[order.numpy()], damage
    return Ranking(orders, damages)


Found = dict[str, tuple[Tensor, Tensor]]  # family -> (order [U], damage [U + 1])


def slices_of(view: View, family: Family, part: str) -> list[tuple[Site, Slice]]:
    """The slices of weights: those that make the units, those that read them, or all."""
    found = []
    for each in family.slices:
        site, axis = view.sites[each.tensor], each.axis
        makes, reads = axis == site.axis, axis == site.contracted
        own = {"makes": site.is_weight and makes, "reads": site.is_weight and reads}
        if own.get(part, site.is_parameter):
            found.append((site, (view.form(site).decode().float(), axis, torch.from_numpy(each.at))))
    return found


def norm(power: int) -> Callable[[View, Sequence[Family]], Found]:
    def found(view: View, families: Sequence[Family]) -> Found:
        return {
            family.name: in_order(norm_scores([s for _, s in slices_of(view, family, "all")], power))
            for family in families
        }

    return found


def median(view: View, families: Sequence[Family]) -> Found:
    found = {family.name: slices_of(view, family, "makes") for family in families}
    return {name: in_order(median_scores([s for _, s in some])) for name, some in found.items() if some}


def norm_scale(view: View, families: Sequence[Family]) -> Found:
    """The scales of the norms that follow a unit (Liu et al. 2017)."""
    found: Found = {}
    for family in families:
        every = slices_of(view, family, "all")
        own = [s for site, s in every if len(site.shape) == 1 and not site.name.endswith("bias")]
        if own:
            found[family.name] = in_order(norm_scores(own, 1))
    return found


def chance(view: View, families: Sequence[Family]) -> Found:
    found: Found = {}
    for family in families:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{view.seed_for()}/{family.name}".encode()))
        found[family.name] = in_order(torch.rand(family.size, generator=generator))
    return found


def curvature(view: View, families: Sequence[Family]) -> Found:
    """The mean over a unit's weights of tr(F W_u H W_u^T): how much the output changes without it."""
    every = {site.name: site for family in families for site, _ in slices_of(view, family, "all")}
    known = curvatures(view.part.plain(), view.part.task, every.values())
    found: Found = {}
    for family in families:
        parts = []
        for site, (weight, axis, index) in slices_of(view, family, "all"):
            if site.name in known:
                parts.append(quadratic(site, weight, known[site.name], axis, index))
        scores = torch.stack(parts).mean(0) if parts else torch.ones(family.size)
        found[family.name] = in_order(scores)
    return found


def quadratic(site: Site, weight: Tensor, factors: Any, axis: int, index: Tensor) -> Tensor:
    """tr(F W_u H W_u^T) for each unit's slices, by the diagonals of both factors; [U]."""
    rows = to_rows(weight, site.axis) if weight.ndim > 1 else weight.reshape(1, -1)
    f = factors.rows.diagonal() if factors.rows.ndim == 2 else factors.rows
    h = factors.columns.diagonal() if factors.columns.ndim == 2 else factors.columns
    each = rows.square() * f[:, None] * h  # [O, I]
    each = from_rows(each, tuple(weight.shape), site.axis)
    total = each.movedim(axis, 0).reshape(each.shape[axis], -1).sum(1)
    return total[index].sum(1)


def activation(view: View, families: Sequence[Family]) -> Found:
    found: Found = {}
    for family in families:
        readers = []
        for site, (weight, axis, index) in slices_of(view, family, "reads"):
            if (moment := view.part.gram(site)) is not None:
                readers.append((to_rows(weight, site.axis), moment, columns_of(weight, axis, index)))
        if readers:
            found[family.name] = in_order(reading_scores(readers))
    return found


def redundancy(view: View, families: Sequence[Family]) -> Found:
    sites = {s.name: s for family in families for s, _ in slices_of(view, family, "reads")}
    known = curvatures(view.part.plain(), view.part.task, sites.values())
    found: Found = {}
    for number, family in enumerate(families, 1):
        readers = []
        for site, (weight, axis, index) in slices_of(view, family, "reads"):
            moment = view.part.gram(site)
            if moment is None or len(moment) > WIDEST or site.name not in known:
                continue
            f = known[site.name].rows
            f = f.diagonal() if f.ndim == 2 else f
            # E S S^T is E g g^T times the size of the inputs: divided by it, the error of an output weighs
            # what the loss says.
            weigh = (f / moment.diagonal().sum().clamp_min(1e-30)).clamp_min(0).sqrt()
            rows = to_rows(weight, site.axis) * weigh[:, None]
            count = view.part.samples(site)
            readers.append(Reader(rows, moment, columns_of(weight, axis, index), count))
        if readers:
            found[family.name] = tuple(removal(readers, family.size))  # type: ignore[assignment]
        view.observer.progress(number, len(families), family.name)
    return found


def columns_of(weight: Tensor, axis: int, index: Tensor) -> Tensor:
    """The columns of a weight's rows [O, I] that each unit's indices along the axis of inputs are, [U, K]."""
    kernel = weight[0, 0].numel() if weight.ndim > 2 else 1
    at = index[:, :, None] * kernel + torch.arange(kernel)
    return at.flatten(1)


def taylor(view: View, families: Sequence[Family]) -> Found:
    model = view.plain()
    parameters = dict(model.named_parameters())
    scores = {family.name: torch.zeros(family.size, dtype=torch.float64) for family in families}
    with evaluating(model), steady(view.task.train), torch.enable_grad():
        for number, batch in enumerate(view.task.batches("train")):
            if number == GRADIENTS:
                break
            here = move(batch, device_of(model))
            view.task.loss_of(view.task.answer(model, here), here).backward()
            for family in families:
                total = torch.zeros(family.size, dtype=torch.float64)
                for site, (weight, axis, index) in slices_of(view, family, "makes"):
                    if (gradient := parameters[site.name].grad) is not None:
                        total += by_unit((gradient.cpu() * weight).double(), axis, index)
                scores[family.name] += total.square()
            model.zero_grad()
    return {name: in_order(score) for name, score in scores.items()}


BY: dict[str, Callable[[View, Sequence[Family]], Found]] = {
    "redundancy": redundancy, "curvature": curvature, "taylor": taylor, "activation": activation,
    "l1": norm(1), "l2": norm(2), "median": median, "norm_scale": norm_scale, "random": chance,
}  # fmt: skip
