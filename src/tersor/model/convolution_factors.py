"""Convolution factors: replace a convolution whose kernel is a product by two or three smaller convolutions.

tucker    1 x 1, kernel, 1 x 1           W = left right: left [O, R]; right [R, I, K] of rank S in its inputs
cp        1 x 1, depthwise, 1 x 1        W = left right; each right[r] [I, K] of rank 1
spatial   columns, rows                  W [O, I, H, W] of rank R as a matrix [(O, W), (I, H)]
Sources: Kim 2016, Lebedev 2015, Jaderberg 2014. The factors are found from the weight, which must be such a
product already: then the convolutions compute the same. Stride, padding and dilation stay with the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms import Dense, Form, LowRank
from tersor.maths.ranks import svd_factors
from tersor.model.axes import with_ones
from tersor.model.product import CONVOLUTIONS

FACTORS = ("tucker", "cp", "spatial")
SAME = ("stride", "padding", "dilation")
New = dict[str, tuple[Form, str]]


def checked(layer: Any, path: str, how: str, rank: Any) -> int:
    """The rank. RefusedError if this layer cannot become such convolutions."""
    kind = type(layer)
    if kind not in CONVOLUTIONS or how == "spatial" and kind is not nn.Conv2d:
        what = "convolutions in two dimensions" if how == "spatial" else "convolutions"
        raise RefusedError(f"{path}: a {kind.__name__} has no {how} factors; {what} have")
    if layer._parameters.get("weight") is None:
        raise RefusedError(
            f"{path}: its weight is computed from other tensors, so it cannot be stored as factors"
        )
    if layer.groups != 1:
        raise RefusedError(f"{path}: it has {layer.groups} groups; {how} factors have one")
    if type(rank) is not int or rank < 1:
        raise RefusedError(f"{path}: the rank of {how} factors is 1 or more, not {rank!r}")
    return rank


def build(layer: Any, how: str, rank: int) -> nn.Sequential:
    """The convolutions in the order of the forward, without their tensors."""
    kind: Any = type(layer)
    bias, bare = layer._parameters.get("bias") is not None, {"device": "meta"}
    same = {key: getattr(layer, key) for key in SAME}
    mode = {"padding_mode": layer.padding_mode}
    if how == "spatial":
        parts = [
            {key: value if isinstance(value, str) else one(value, axis, key) for key, value in same.items()}
            for axis in (0, 1)
        ]
        h, w = layer.kernel_size
        return nn.Sequential(
            kind(1, 1, (h, 1), bias=False, **parts[0], **mode, **bare),
            kind(1, 1, (1, w), bias=bias, **parts[1], **mode, **bare),
        )
    wide = {"groups": rank} if how == "cp" else {}
    channels = rank if how == "cp" else 1
    return nn.Sequential(
        kind(1, 1, 1, bias=False, **bare),
        kind(channels, channels, layer.kernel_size, bias=False, **same, **mode, **wide, **bare),
        kind(1, 1, 1, bias=bias, **bare),
    )


def one(value: tuple[int, ...], axis: int, key: str) -> tuple[int, ...]:
    """A setting of a convolution along this axis alone: on the other, stride 1 and no padding."""
    rest = 0 if key == "padding" else 1
    return tuple(size if at == axis else rest for at, size in enumerate(value))


def factor_forms(layer: Any, path: str, how: str, rank: int, forms: Mapping[str, Form]) -> New:
    """The new convolutions' tensors, {name in the sequence: (form, origin)}."""
    weight = forms["weight"]
    if how == "spatial":
        o, i, h, w = weight.shape
        rows = weight.decode().permute(0, 3, 1, 2).reshape(o * w, i * h)
        left, right = svd_factors(rows, min(rank, *rows.shape))
        count = left.shape[1]
        new: New = {
            "0.weight": (Dense(right.reshape(count, i, h, 1).contiguous()), "weight rows"),
            "1.weight": (
                Dense(left.reshape(o, w, count).permute(0, 2, 1)[:, :, None].contiguous()),
                "weight columns",
            ),
        }
    else:
        if not isinstance(weight, LowRank):
            raise RefusedError(f"{path}.weight is stored as one factor; {how} factors start from a product")
        first, middle = (inner_tucker if how == "tucker" else inner_cp)(weight.right.decode(), path, rank)
        ones = len(layer.kernel_size)
        new = {
            "0.weight": (Dense(first.reshape(*first.shape, *[1] * ones)), "weight inputs"),
            "1.weight": (Dense(middle), "weight kernel"),
            "2.weight": (with_ones(weight.left, ones), "weight left"),
        }
    if "bias" in forms:
        new[f"{1 if how == 'spatial' else 2}.bias"] = (forms["bias"], "bias")
    return new


def inner_tucker(right: Tensor, path: str, rank: int) -> tuple[Tensor, Tensor]:
    """(inputs [S, I], core [R, S, ...]) of a right factor [R, I, ...]."""
    rows = right.movedim(1, 0)  # [I, R, ...]
    inputs, core = svd_factors(rows.flatten(1), min(rank, *rows.flatten(1).shape))  # [I, S], [S, R ...]
    core = core.reshape(-1, right.shape[0], *right.shape[2:]).movedim(0, 1)
    return inputs.T.contiguous(), core.contiguous()


def inner_cp(right: Tensor, path: str, rank: int) -> tuple[Tensor, Tensor]:
    """(inputs [R, I], kernels [R, 1, ...]) of a right factor [R, I, ...] whose slices have rank 1."""
    if right.shape[0] != rank:
        raise RefusedError(f"{path}.weight is a product of rank {right.shape[0]}, but {rank} was requested")
    u, d, v = torch.linalg.svd(right.flatten(2).double(), full_matrices=False)
    half = d[:, :1].sqrt()
    kernels = (half * v[:, 0]).reshape(rank, 1, *right.shape[2:])
    return (u[:, :, 0] * half).to(right.dtype).contiguous(), kernels.to(right.dtype).contiguous()
