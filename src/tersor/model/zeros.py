"""Zeros: what stands for a layer of a removed branch: zeros, in the shape that the layer's output had.

y = 0    of the shape of the first floating argument; of another size along one axis, if the layer's was
The call is that of any module: all other arguments are ignored. Cost: y is allocated; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError

AXES = 8  # of a tensor, at most
WIDEST = 1 << 20  # along one axis: a file from a stranger asks for no more memory than that times its input


class Zeros(nn.Module):
    """Zeros like the first floating tensor among the arguments."""

    # nn.TransformerEncoderLayer reads these of its attention before it uses its fused kernel.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, path: str, layer: Any, axis: int = 0, size: int = 0, outputs: int = 0) -> None:
        """`size`: along `axis`, if it is not that of the argument. `outputs`: 0 for a tensor; for a layer
        that returns a tuple its length: the zeros come first, then None. RefusedError for impossible
        numbers."""
        super().__init__()
        if not 0 <= size <= WIDEST or not -AXES <= axis < AXES or not 0 <= outputs <= AXES:
            raise RefusedError(f"{path}: no zeros have axis={axis}, size={size}, outputs={outputs}")
        self.path, self.axis, self.size, self.outputs = path, axis, size, outputs
        self.batch_first = getattr(layer, "batch_first", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        like = first_floating((*args, *kwargs.values()))
        if like is None:
            raise RefusedError(f"{self.path}: it got no floating tensor to give zeros of the shape of")
        if self.size:
            shape = list(like.shape)
            shape[self.axis] = self.size
            zeros = like.new_zeros(shape)
        else:
            zeros = torch.zeros_like(like)
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros

    def extra_repr(self) -> str:
        return f"axis={self.axis}, size={self.size}" if self.size else ""


def first_floating(values: Iterable[Any]) -> Tensor | None:
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)
