"""Deployed: a model as a runtime gets it, with grids on its edges and weights as integers.

simulated   the model's own forward in float, each edge rounded to its grid       simulate.py
spelled     for export: each grid is one operator tersor::grid, each integer weight tersor::dequantize
A runtime's writer translates the two operators. Both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.forms import Form
from tersor.forms.grid import Grid
from tersor.model.edges import Edge, edges_of
from tersor.model.grid_part import GridPart
from tersor.model.integer_weights import IntegerWeight, integer_weight
from tersor.model.simulate import Simulated, refuse_stale
from tersor.model.watch import made_at


class Deployed(Simulated):
    """A simulation that knows the codes of its weights. `spelled` is set in a copy for export."""

    spelled = False

    def __init__(
        self, model: nn.Module, edge_grids: Mapping[str, Grid], weights: Mapping[str, IntegerWeight]
    ):
        """`model`: a private copy with decoded weights. `weights`: its tensors that are integers, by name."""
        super().__init__(model, edge_grids)
        self.axes = {name: weight.axis for name, weight in weights.items()}
        for at, weight in enumerate(weights.values()):
            self.register_buffer(f"codes_{at}", weight.codes)
            self.register_buffer(f"scale_{at}", weight.scale)
        self.requires_grad_(False)

    def spell(self) -> None:
        """Trace as operators of its own from now on."""
        self.spelled = True
        for part in self.grids.values():
            cast(GridPart, part).marked = True

    def rounded(self, inputs: tuple[Any, ...] | dict[str, Any]) -> dict[str, Edge]:
        """The edges with grids, by the names of the grids, as a forward with these inputs meets them."""
        given = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        edges = edges_of(self.net, *given[0], **given[1])
        return {name: edges[made_at(name)] for name in self.table}

    def values(self) -> dict[str, Tensor]:
        if not self.spelled:
            return {}
        return {
            name: torch.ops.tersor.dequantize(
                getattr(self, f"codes_{at}"), getattr(self, f"scale_{at}"), axis
            )
            for at, (name, axis) in enumerate(self.axes.items())
        }


def deployed(model: nn.Module, grids: Mapping[str, Grid], forms: Mapping[str, Form]) -> nn.Module:
    """The given model itself, not a copy, as a runtime gets it. `forms`: of its weights, by name. Without
    grids nothing is an integer. RefusedError if a grid is stale."""
    if not grids:
        return model
    refuse_stale(grids)
    found = {name: integer_weight(form) for name, form in forms.items()}
    return Deployed(model, grids, {name: w for name, w in found.items() if isinstance(w, IntegerWeight)})
