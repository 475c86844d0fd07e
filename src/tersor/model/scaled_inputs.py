"""Scaled inputs: a linear layer that multiplies what it reads by a factor for each input.

y = W (factor x) + b        factor [I]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError

LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class ScaledInputs(nn.Linear):
    """A linear layer with `factor` [I]."""

    factor: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.factor, self.weight, self.bias)


def build(layer: Any, path: str, factor: Any) -> ScaledInputs:
    """The layer with a factor, sharing everything else. RefusedError if it is no plain linear layer."""
    if type(layer) not in LINEAR:
        raise RefusedError(f"{path}: a {type(layer).__name__} takes no factors of its inputs; nn.Linear does")
    if layer._parameters.get("weight") is None:
        raise RefusedError(f"{path} computes its weight: factors of its inputs cannot be added")
    new = ScaledInputs.__new__(ScaledInputs)
    vars(new).update(vars(layer))
    new._parameters = {"factor": factor, **layer._parameters}
    return new
