"""Deployed: a model as a runtime gets it, with grids on its edges and weights as codes.

simulated   the model's own forward in float, each edge rounded to its grid       simulate.py
spelled     for export: each grid is one operator tersor::grid, each integer weight tersor::dequantize, each
            packed one tersor::dequantize_blocks
A runtime's writer translates these operators. Both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.dtypes import HALVES
from tersor.forms import Dense, Form
from tersor.forms.grid import Grid
from tersor.forms.ongrid import OnGrid
from tersor.model.edges import Edge, edges_of
from tersor.model.grid_part import GridPart
from tersor.model.integer_weights import IntegerWeight, integer_weight, under_masks
from tersor.model.packed_weights import PackedWeight, packed_weight
from tersor.model.simulate import Simulated, refuse_stale, tensors_of
from tersor.model.watch import made_at


class Deployed(Simulated):
    """A simulation that knows the codes of its weights. `spelled` is set in a copy for export."""

    spelled = False

    def __init__(
        self,
        model: nn.Module,
        edge_grids: Mapping[str, Grid],
        weights: Mapping[str, IntegerWeight | PackedWeight],
        left: Mapping[str, str] | None = None,
        halves: Collection[str] = (),
    ):
        """`model`: a private copy with decoded weights. `weights`: its tensors that are codes, by name.
        `left`: why others, which are stored in fewer bits too, are floats. `halves`: the 16-bit floats."""
        super().__init__(model, edge_grids)
        self.halves = tuple(halves)
        self.left = dict(left or {})
        self.makers: dict[str, Any] = {}  # partials of the weights, without their tensors
        for at, (name, weight) in enumerate(weights.items()):
            for part in weight.tensors:
                self.register_buffer(f"{part}_{at}", getattr(weight, part))
            rest = {key: value for key, value in vars(weight).items() if key not in weight.tensors}
            self.makers[name] = partial(type(weight), **rest)
        self.requires_grad_(False)

    @property
    def packed(self) -> dict[str, str]:
        """The buffer with the codes -> the weight, for the packed ones."""
        makers = enumerate(self.makers.items())
        return {f"codes_{at}": name for at, (name, make) in makers if make.func is PackedWeight}

    def spell(self) -> None:
        """Trace as operators of its own from now on."""
        self.spelled = True
        for part in self.grids.values():
            cast(GridPart, part).marked = True

    def rounded(self, inputs: tuple[Any, ...] | dict[str, Any]) -> dict[str, Edge]:
        """The edges with grids, by the names of the grids, as a forward with these inputs meets them."""
        if not self.table:
            return {}
        given = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        edges = edges_of(self.net, *given[0], **given[1])
        return {name: edges[made_at(name)] for name in self.table}

    def values(self) -> dict[str, Tensor]:
        if not self.spelled:
            return {}
        return {
            name: make(**{part: getattr(self, f"{part}_{at}") for part in make.func.tensors}).decode()
            for at, (name, make) in enumerate(self.makers.items())
        }


def deployed(
    model: nn.Module, grids: Mapping[str, Grid], forms: Mapping[str, Form], weights: str = "packed"
) -> nn.Module:
    """The given model itself, not a copy, as a runtime gets it. `forms`: of its weights, by name. `weights`:
    "float" leaves all in float but those that integer kernels read, which are integers if edges have grids.
    RefusedError if a grid is stale."""
    refuse_stale(grids)
    own = tensors_of(model)
    found: dict[str, IntegerWeight | PackedWeight] = {}
    left: dict[str, str] = {}
    halves: list[str] = []
    for name, form in forms.items():
        codes: IntegerWeight | PackedWeight | str = integer_weight(form) if grids else ""
        if isinstance(codes, str) and weights == "packed":
            codes = packed_weight(form, own[name].dtype)
        if not isinstance(codes, str):
            found[name] = codes
        elif weights == "packed" and smaller(form):
            left[name] = codes
        elif weights == "packed" and half(form) and own[name].dtype is torch.float32:
            halves.append(name)
    return Deployed(model, grids, found, left, halves) if grids or found or left or halves else model


def smaller(form: Form) -> bool:
    """Whether a form stores its numbers in fewer bits than floats."""
    return any(isinstance(node, OnGrid) for _, node in form.walk())


def half(form: Form) -> bool:
    """Whether a form stores its numbers as 16-bit floats."""
    plain, _ = under_masks(form)
    return isinstance(plain, Dense) and plain.dtype in HALVES.values()
