"""Saturation: integer layers as processors without VNNI instructions compute them.

sum = clip(x0 w0 + x1 w1) + clip(x2 w2 + x3 w3) + ...     clip: to 16 bits; x: uint8 codes, w: int8 codes
pairs       two adjacent input channels of a group at one place of the kernel; two adjacent inputs of a linear
            layer. Depthwise convolutions have none
excess      of an output: what its clipped pairs lose. It is subtracted from the exact output
Only pairs of large weights of one sign can get beyond 16 bits, so few are looked at: weights of up to 7 bits
have none. Cost: samples * positions * such pairs.
Source: the instruction vpmaddubsw. OpenVINO computes so if ONEDNN_MAX_CPU_ISA=AVX512_CORE; a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.forms.grid import Grid
from tersor.model.integer_ops import IntegerLayer
from tersor.model.integer_weights import IntegerWeight
from tersor.model.simulate import Simulated, Values
from tersor.model.watch import made_at

LOW, HIGH = -(2**15), 2**15 - 1
CODES = 255  # the largest of an activation
CONVS = {"conv1d": 1, "conv2d": 2}
PRODUCTS = {"linear": 0, "matmul": 0, "addmm": 1}  # the argument that is an activation
TURNED = ("matmul", "addmm")  # their weight is [I, O]
NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CHUNK = 1 << 23  # sums that are looked at together


@dataclass(eq=False)
class Pairs:
    """The pairs of a layer's weights that can get beyond 16 bits: `at` [K, 3] are output, pair, place."""

    op: str
    shape: tuple[int, ...]  # of the weight: [O, I], or [O, I / groups, ...]
    scale: Tensor  # [1] or [O]
    grid: Grid
    at: Tensor
    first: Tensor  # [K], the weights of a pair
    second: Tensor
    seen: int = 0  # sums of two products
    clipped: int = 0

    def computed(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """In place of func(x, weight, ...): its output without the excess."""
        out = func(*args, **kwargs)
        if self.op in CONVS:
            given = dict(zip(NAMES, args, strict=False)) | kwargs
            x, groups = self.codes(given["input"]), int(given.get("groups", 1))
            x = x if x.ndim == 2 + CONVS[self.op] else x[None]  # an image without an axis of samples
            size = max(1, CHUNK // max(1, x.shape[1:].numel() * math.prod(self.shape[2:])))
            parts = [self.of_columns(self.columns(part, given), groups) for part in x.split(size)]
            lost = torch.cat(parts)
            return out - lost.reshape(out.shape).to(out)
        x = self.codes(given_at(PRODUCTS[self.op], args, kwargs))
        rows = x.reshape(-1, x.shape[-1]).t()[None, :, None]  # [1, I, 1, R]
        return out - self.of_columns(rows, 1)[0].t().reshape(out.shape).to(out)

    def codes(self, x: Tensor) -> Tensor:
        x = x.detach().float()  # 16 bits do not hold the sums
        scale, zero = self.ends(x)
        return (x / scale + zero).round().clamp(0, CODES)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.grid
        scale = grid.scale.decode() if grid.scale is not None else torch.ones(1)
        zero = grid.zero.decode() if grid.zero is not None else torch.zeros(1)
        return scale.to(x).reshape(()), zero.to(x).reshape(())

    def columns(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """What a convolution multiplies, [N, C, places, L]; padding has the code of zero."""
        n, size = CONVS[self.op], self.shape[2:]
        stride, dilation = (each(given.get(word, 1), n) for word in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            ends = [(left // 2, left - left // 2) for left in whole]
        else:
            ends = [(p, p) for p in each(0 if padding == "valid" else padding, n)]
        x = F.pad(x, [p for pair in reversed(ends) for p in pair], value=float(self.ends(x)[1]))
        if n == 1:
            x, size, stride, dilation = x[..., None, :], (1, *size), (1, *stride), (1, *dilation)
        found = F.unfold(x, size, dilation=dilation, stride=stride)
        return found.unflatten(1, (x.shape[1], -1))

    def of_columns(self, columns: Tensor, groups: int) -> Tensor:
        """The excess [N, O, L] of outputs, in the units of the outputs."""
        n, channels, places, many = columns.shape
        outputs = self.shape[0]
        lost = columns.new_zeros(n, outputs, many)
        self.seen += n * many * outputs * places * (channels // groups // 2)
        at, first, second = (x.to(columns.device) for x in (self.at, self.first, self.second))
        for part in torch.arange(len(at), device=at.device).split(max(1, CHUNK // max(1, n * many))):
            out, pair, place = at[part].unbind(1)
            left = out // (outputs // groups) * (channels // groups) + 2 * pair
            sums = columns[:, left, place] * first[part, None]
            sums += columns[:, left + 1, place] * second[part, None]
            over = sums - sums.clamp(LOW, HIGH)
            self.clipped += int((over != 0).sum())
            lost.index_add_(1, out, over)
        return lost * (self.ends(lost)[0] * self.scale.to(lost).expand(outputs))[:, None]


class Saturated(Simulated):
    """A simulation whose integer layers compute as without VNNI. `pairs`: by the output edge of a layer."""

    def __init__(self, model: nn.Module, grids: Mapping[str, Grid], pairs: Mapping[str, Pairs]):
        super().__init__(model, grids)
        self.pairs = dict(pairs)

    def watched(self, values: dict[str, Tensor]) -> Values:
        return Saturating(self, values)


class Saturating(Values):
    """A run that clips the pairs of a simulation's layers."""

    simulated: Saturated

    def instead(self, op: str, func: Callable[..., Any]) -> Callable[..., Any]:
        made, k = self.next(op)
        found = self.simulated.pairs.get(f"{made}:{k}")
        return super().instead(op, func) if found is None else partial(found.computed, func)


def pairs_of(
    layers: Iterable[IntegerLayer], weights: Mapping[str, IntegerWeight], grids: Mapping[str, Grid]
) -> tuple[dict[str, Pairs], list[str]]:
    """(the layers that can get beyond 16 bits, by the edge of their output; the weights of others that are
    not looked at: their operators, views of weights, or ranges that are found when the model runs, are not
    simulated)."""
    found: dict[str, Pairs] = {}
    other: list[str] = []
    for layer in layers:
        weight, grid = weights[layer.weight], grids[layer.edge]
        if grid.bits > 8 or not large(weight.codes):  # 16 bits are computed in float
            continue
        one = grid.scale is not None and tuple(grid.scale.shape) == (1,) and not grid.signed
        turned = layer.op in TURNED
        reads = layer.read.rpartition("<")[2] == str(PRODUCTS.get(layer.op, 0))
        if (
            not one
            or not reads
            or not layer.direct
            or layer.op not in (*CONVS, *PRODUCTS)
            or (turned and weight.codes.ndim != 2)
            or (len(weight.scale) > 1 and weight.axis != turned)
        ):
            other.append(layer.weight)
            continue
        codes = weight.codes.t() if turned else weight.codes
        at, first, second = large_pairs(codes)
        if len(at):
            shape = tuple(codes.shape)
            found[made_at(layer.read)] = Pairs(layer.op, shape, weight.scale, grid, at, first, second)
    return found, other


def large(codes: Tensor) -> bool:
    """Whether two weights could get beyond 16 bits."""
    return 2 * CODES * int(codes.int().abs().max() if codes.numel() else 0) > HIGH


def large_pairs(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, pair and place [K, 3], first weight [K], second weight [K]) of pairs that can be clipped."""
    w = codes.float().reshape(*codes.shape[:2], -1)  # [O, C, places]
    even = w.shape[1] // 2 * 2
    first, second = w[:, 0:even:2], w[:, 1:even:2]
    top = CODES * (first.clamp_min(0) + second.clamp_min(0))
    low = CODES * (first.clamp_max(0) + second.clamp_max(0))
    at = ((top > HIGH) | (low < LOW)).nonzero()
    where = tuple(at.unbind(1))
    return at, first[where], second[where]


def given_at(place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The activation that a product reads."""
    found = args[place] if place < len(args) else kwargs["mat1" if place else "input"]
    return cast(Tensor, found)


def each(value: Any, count: int) -> tuple[int, ...]:
    """One number, or one per axis, as one per axis."""
    return (int(value),) * count if isinstance(value, int) else tuple(int(one) for one in value)
