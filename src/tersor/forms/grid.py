"""Grid: how the values on one edge of the graph are rounded while the model runs.

x ~ (q - zero) * scale        q: an integer of `bits` bits; one scale for all, or one per channel
A dynamic grid has no scale: each tensor gets the one that spans it, when the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersor.forms.form import Form
from tersor.forms.node import Node


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Node):
    """The uniform grid of an edge. It represents no tensor, so it has no `decode` and no `take`."""

    name: ClassVar[str] = "grid"
    scale: Form | None = None  # float32, [1], or [C] along `axis`; None: dynamic, codes are uint8
    zero: Form | None = None  # integer, shaped like scale; without it the grid is symmetric
    bits: int = 8
    signed: bool = False  # q from -2^(bits - 1), else from 0
    axis: int = 1  # the axis of the C channels
    stale: bool = False  # something upstream changed after the grid was calibrated
