"""Counted run: a model that answers as if units were removed, by its traced graph, without cutting anything.

The units have zeros in every slice, and each normalizer (LayerNorm, softmax, ...) sees only the kept ones. It
is the reference for a cut of units that a normalizer counts: there a zero is not the same as a cut.
Cost: a trace for each shape of the inputs, and a forward of the module for the structure of its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from tersor.errors import RefusedError
from tersor.model.channels.groups import removal, walked
from tersor.model.channels.run_graph import GraphRun
from tersor.model.channels.walk import Walk
from tersor.model.graph import Inputs
from tersor.model.outputs import changed


class CountedRun(nn.Module):
    """A model without some units. In training mode it runs as it is."""

    def __init__(self, model: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]]):
        """`kept`: for each tensor and axis that is cut, the indices that stay."""
        super().__init__()
        self.model = model
        self.walks: dict[Any, Walk] = {}
        self.kept = {key: np.array(index) for key, index in kept.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.training:
            return output
        inputs: Inputs = bound(self.model, args, kwargs) if kwargs else args
        groups, gone = removal(self.walk_for(inputs), self.kept)
        implied = groups.cuts(gone)
        alike = implied.keys() == self.kept.keys()
        if not alike or not all(np.array_equal(implied[key], self.kept[key]) for key in implied):
            raise RefusedError("the cut leaves out slices that belong to its units")
        tensors = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        wide = any(tensor.dtype is torch.float64 for tensor in tensors.values())
        found = GraphRun(groups, gone, cut=False, wide=wide).outputs(tensors, tree_leaves(inputs))
        answers: Iterator[Tensor] = iter(found)
        return changed(output, lambda tensor: next(answers))

    def walk_for(self, inputs: Inputs) -> Walk:
        leaves, structure = tree_flatten(inputs)
        key = (structure, *((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if key not in self.walks:
            self.walks[key] = walked(self.model, inputs, set(self.model.state_dict()))
        return self.walks[key]


def bound(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name, in the order of the signature: so the graph has them, and so they are fed."""
    found = inspect.signature(model.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, item in found.arguments.items():
        rest = found.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= item if rest else {name: item}
    return named
