"""Units: split a weight [O, I] into quantization units, the parts that share one scale or threshold.

per="tensor"    one unit [1, O * I]
per="channel"   O units [O, I]
per="group"     O * G units [O * G, S] of S consecutive columns; a last, shorter group is padded and masked

Every function of this folder that takes `per` works on units [U, S], so it does not depend on `per`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tersor.errors import SettingError, did_you_mean

PER = ("tensor", "channel", "group")
TINY = 2.0**-126  # the smallest normal float32: smaller scales lose precision or become 0
HUGE = torch.finfo(torch.float32).max
AT_ONCE = 1 << 20  # weights processed at a time: their copies stay in cache


def check_choice(who: str, name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that is not in the table."""
    if value not in (names := tuple(allowed)):
        raise SettingError(f"{who}: {name}={value!r}; {did_you_mean(value, names)}")


def check_bits(who: str, bits: int, low: int, high: int) -> None:
    """Refuse a number of bits out of range."""
    if not low <= bits <= high:
        raise SettingError(f"{who}: bits={bits}, but {low} to {high} is allowed")


def check_percentile(who: str, percentile: float) -> None:
    """Refuse a percentile out of range, such as a share."""
    if not 50 < percentile <= 100:
        raise SettingError(
            f"{who}: percentile={percentile}, but it must be in percent: 50 < percentile <= 100"
        )


def check_units(who: str, shape: torch.Size, per: str, group: int, keep: Tensor | None = None) -> None:
    """Refuse a shape that is not [O, I], an unknown `per`, an empty group, a mask of another shape."""
    check_choice(who, "per", per, PER)
    if len(shape) != 2 or 0 in shape:
        raise SettingError(
            f"{who}: got a tensor of shape {list(shape)}, but a weight is [O, I], both at least 1"
        )
    if per == "group" and group < 1:
        raise SettingError(f"{who}: group={group}, but it is the number of weights in a group: 1 or more")
    if keep is not None and (keep.shape != shape or keep.dtype != torch.bool):
        raise SettingError(
            f"{who}: keep is {keep.dtype} {list(keep.shape)}, but must be a bool mask of w's shape, "
            f"{list(shape)}"
        )


def finite(who: str, w: Tensor) -> Tensor:
    """w as float32. NaN and infinity are refused, since no code represents them."""
    w = w.detach().float()
    step = max(1, AT_ONCE * len(w) // max(w.numel(), 1))
    if not all(bool(torch.isfinite(rows).all()) for rows in w.split(step)):  # in blocks, to save memory
        bad = int((~torch.isfinite(w)).sum())
        raise SettingError(
            f"{who}: {bad} of {w.numel()} weights are NaN or beyond float32. Repair the weights first"
        )
    return w


def group_size(columns: int, group: int) -> int:
    """The group size, at most the length of a row."""
    return min(group, columns)


def to_units(w: Tensor, per: str, group: int, fill: float | bool = 0) -> Tensor:
    """w [O, I] -> [U, S]. A short last group is padded with `fill`."""
    rows, columns = w.shape
    if per == "tensor":
        return w.reshape(1, -1)
    if per == "channel":
        return w
    size = group_size(columns, group)
    if short := -columns % size:
        w = torch.cat([w, w.new_full((rows, short), fill)], 1)
    return w.reshape(-1, size)


def from_units(x: Tensor, shape: torch.Size, per: str) -> Tensor:
    """Inverse of `to_units`: [U, S] -> [O, I], without the padding."""
    rows, columns = shape
    if per == "group":
        return x.reshape(rows, -1)[:, :columns]
    return x.reshape(rows, columns)


def unit_mask(w: Tensor, keep: Tensor | None, per: str, group: int) -> Tensor | None:
    """Mask bool [U, S] of the weights that count. None if all do, which saves a pass over the weights."""
    if keep is not None:
        return to_units(keep.to(w.device), per, group, fill=False)
    if per == "group" and w.shape[1] % group_size(w.shape[1], group):
        return to_units(torch.ones(w.shape, dtype=torch.bool, device=w.device), per, group, fill=False)
    return None


def unit_table(values: Tensor, shape: torch.Size, per: str) -> Tensor:
    """One value for each unit [U] -> [1, 1], [O, 1] or [O, G]."""
    return values.reshape(1, 1) if per == "tensor" else values.reshape(shape[0], -1)


def exponent(x: Tensor) -> Tensor:
    """Integer e [U] with max |x| near 2**e, clipped to the exponents of normal float32. x [U, S]."""
    return torch.frexp(x.abs().amax(1)).exponent.clamp(-126, 126)


def shift(x: Tensor, by: Tensor) -> Tensor:
    """x * 2**by, exact up to under- and overflow. Used so that squares of small weights do not underflow."""
    return x * torch.exp2(by.to(x.dtype))


def expand(scale: Tensor, group: int | Tensor, columns: int) -> Tensor:
    """scale [1, 1], [O, 1] or [O, G] -> [O or 1, columns], one value for each weight. `group`: columns of a
    group, or the group of each column, int64 [columns]."""
    groups = scale.shape[1]
    if groups == 1:
        return scale.expand(-1, columns)
    if isinstance(group, Tensor):
        return scale[:, group.to(scale.device)]
    if group < 1 or groups != -(-columns // group):
        raise SettingError(f"expand: {groups} groups of {group} columns do not make {columns} columns")
    return scale.repeat_interleave(group, 1)[:, :columns]
