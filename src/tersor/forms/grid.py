"""Grid: the even grid that rounds one edge of the graph, a tensor between two operators.

y = (clamp(round(x / scale) + zero, low, high) - zero) * scale      one grid a tensor [1], or a channel [C]
low, high   0 and 2^bits - 1; signed: -2^(bits - 1) and 2^(bits - 1) - 1
stored      32 bits a scale, 8 a zero (32 from 9 bits on)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.forms.form import Form


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Form):
    """An even grid for the values of an edge."""

    name: ClassVar[str] = "grid"
    scale: Tensor  # float32, [1] or [C], > 0
    zero: Tensor  # integer, shaped like scale, between low and high
    bits: int = 8
    signed: bool = False
    axis: int = -1  # the axis of channels, from 0; -1: one grid for the whole tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.scale.shape)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest code."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)
