"""Corrected biases: each layer's bias takes up how far integers move the means of its outputs.

b' = b + shift      model/lockstep.py: of rounded weights and activations together, layer by layer
A layer whose bias is missing, shared, frozen or stored in another form keeps it, and is named.
Cost: two passes over the calibration batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from tersor.core.view import View
from tersor.errors import few
from tersor.forms import Dense, uncoded
from tersor.model.integer_ops import CONVS, IntegerLayer
from tersor.model.lockstep import shifts
from tersor.model.watch import made_at
from tersor.record.events import Note
from tersor.steps.activations import Rounded
from tersor.steps.layerwise import frozen


def corrected_biases(view: View, rounded: Rounded) -> Iterator[Note]:
    """Move the biases of the layers that compute with integers. `view`: of the model before rounding."""
    part = view.part
    before, after = part.plain(), part.plain(rounded.forms)
    still, counts = frozen(before, view), Counter(layer.bias for layer in rounded.layers)
    layers: dict[str, IntegerLayer] = {}
    axes: dict[str, int] = {}
    left: dict[str, str] = {}
    for layer in rounded.layers:
        name = layer.bias
        channels = 1 if layer.op.startswith("conv") else layer.ndim - 1
        if name is None:
            why = "it has no bias"
        elif counts[name] > 1 or not layer.alone or name in view.state.aliases.values():
            why = "its bias is read elsewhere too"
        elif name in still:
            why = "its bias is frozen"
        elif name not in view.sites or not isinstance(uncoded(rounded.form(name)), Dense):
            why = "its bias is no plain tensor"
        elif layer.ndim < 2 or (layer.op in CONVS and layer.ndim != len(view.shape(layer.weight))):
            why = "it has no axis of samples"
        else:
            edge = made_at(layer.read)
            layers[edge], axes[edge] = layer, channels
            continue
        left[layer.weight] = why
    found, several = shifts(before, after, part.task, rounded.grids, axes) if axes else ({}, set())
    for edge in several:
        left[layers[edge].weight] = "it is called several times"
    moved = {edge: shift for edge, shift in found.items() if fits(rounded, layers[edge], shift)}
    for edge, shift in moved.items():
        name = str(layers[edge].bias)
        old = rounded.form(name).decode()
        rounded.forms[name] = Dense((old.double() + shift.reshape(old.shape)).to(old.dtype))
    left |= {layers[e].weight: "its outputs are not those of its bias" for e in found if e not in moved}
    text = f"{len(moved)} biases take up what rounding moves on average"
    text += "; not of " + few(f"{name} ({why})" for name, why in left.items()) if left else ""
    yield Note("", "corrected", text, {"biases": len(moved), "left": left})


def fits(rounded: Rounded, layer: IntegerLayer, shift: Tensor) -> bool:
    return bool(shift.isfinite().all()) and rounded.form(str(layer.bias)).decode().numel() == len(shift)
