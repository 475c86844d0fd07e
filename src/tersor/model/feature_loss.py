"""Feature loss: how far a student's feature maps are from a teacher's, also of other widths and sizes.

outputs     mean of (W x - y)^2; W: the identity, or a learned linear map of the channels   Romero 2015
attention   |a(x) - a(y)|^2, mean over samples. a: at each position, the mean of x^2 over the
            channels; divided by the norm over positions                        Zagoruyko, Komodakis 2017
relation    mean of (g(x) - g(y))^2 over pairs of samples. g: X X^T with rows of norm 1,
            X one row a sample                                                             Tung, Mori 2019
Maps are [B, C], [B, T, C], [B, C, L] or [B, C, ...]. Where sizes differ, the larger map is averaged to the
smaller. Attention and relation need no learned map.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError
from tersor.model.losses import mean

FEATURE_LOSSES = ("outputs", "attention", "relation")
POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Match(NamedTuple):
    """How two shapes correspond."""

    axis: int  # of the channels
    widths: tuple[int, int] | None  # the student's and the teacher's number of channels, if they differ
    size: tuple[int, ...] | None  # positions that both are averaged to, if they differ


def match(mine: str, theirs: str, a: tuple[int, ...], b: tuple[int, ...]) -> Match:
    """How a student's map of shape `a` corresponds to a teacher's of shape `b`; RefusedError if it does not.
    `mine` and `theirs` name the layers."""
    fits = len(a) == len(b) >= 2 and a[0] == b[0]
    if fits:
        last = len(a) == 3 and a[1] == b[1] or len(a) > 3 and a[1:-1] == b[1:-1] and a[-1] != b[-1]
        axis = len(a) - 1 if last else 1
        positions = [(p, q) for k, (p, q) in enumerate(zip(a, b, strict=True)) if k not in (0, axis)]
        same = all(p == q for p, q in positions)
        fits = same or len(a) - 2 in POOLS and len(a) > 3
    if not fits:
        raise RefusedError(
            f"features: {mine} returns {list(a)}, the teacher's {theirs} {list(b)}: outputs may differ in "
            f"the number of channels (axis 1, or the last), and maps in their size. Name layers with outputs "
            f"alike, or use feature_loss=relation"
        )
    return Match(
        axis,
        None if a[axis] == b[axis] else (a[axis], b[axis]),
        None if same else tuple(min(pair) for pair in positions),
    )


def pooled(x: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """The map [B, C, ...] averaged to this size; as it is without one."""
    return x if size is None else POOLS[len(size)](x, size)  # type: ignore[arg-type]


def outputs(x: Tensor, y: Tensor, how: Match, along: nn.Module, mask: Tensor | None) -> Tensor:
    """`along`: the learned map of the student's channels to the teacher's. `mask`: see mean()."""
    return mean((along(pooled(x, how.size)) - pooled(y, how.size)).square(), mask)


def attention(x: Tensor, y: Tensor, how: Match, mask: Tensor | None) -> Tensor:
    maps = []
    for z in (x, y):
        active = pooled(z.square().mean(how.axis, keepdim=True), how.size).squeeze(how.axis)
        active = active if mask is None else active * mask
        maps.append(F.normalize(active.flatten(1), dim=1))
    return (maps[0] - maps[1]).square().sum(1).mean()


def relation(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    alike = []
    for z in (x, y):
        counted = mask is not None and z.ndim == 3 and z.shape[:2] == mask.shape
        rows = (z * mask[..., None] if counted else z).flatten(1)  # type: ignore[index]
        alike.append(F.normalize(rows @ rows.T, dim=1))
    return (alike[0] - alike[1]).square().mean()


def feature_loss(
    kind: str, names: tuple[str, str], x: Tensor, y: Tensor, *, along: nn.Module, mask: Tensor | None
) -> Tensor:
    """The loss of two layers' outputs. `names`: of the layers. `mask`: bool [B, T], tokens that count."""
    x, y = x.float(), y.float()
    if kind == "relation":
        if len(x) != len(y):
            match(*names, tuple(x.shape), tuple(y.shape))
        return relation(x, y, mask)
    how = match(*names, tuple(x.shape), tuple(y.shape))
    if kind == "attention":
        if x.ndim < 3:
            raise RefusedError(
                f"features: {names[0]} returns {list(x.shape)}, which has no positions to attend to. Name a "
                f"layer with feature maps, or use feature_loss=relation"
            )
        return attention(x, y, how, mask if how.axis == 2 else None)
    return outputs(x, y, how, along, mask)
