"""Product: replace a layer whose weight is a product of two to four factors by one layer for each factor.

w = left right    Denton et al. 2014; the form LowRank, whose left or right may be products again
linear            y = left (right x) + b
convolution       right keeps kernel, stride, padding and dilation; left is a 1 x 1 convolution
transposed        axis 0 of the weight is its inputs: left^T as a 1 x 1 convolution, then right
embedding         row v of left, then right^T as a linear layer
The factors' forms become the forms of the new layers, with their masks, grids and coders. Coded factors that
are transposed become plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tersor.errors import RefusedError
from tersor.forms import Form, LowRank
from tersor.model.axes import transposed, with_ones

MOST = 4
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def factors(form: Form, path: str = "") -> Iterator[tuple[str, Form]]:
    """(path in the tree, factor) of a product, left to right; a form that is no product is one factor."""
    if isinstance(form, LowRank):
        for key, child in (("left", form.left), ("right", form.right)):
            yield from factors(child, f"{path}.{key}" if path else key)
    else:
        yield path, form


def checked(layer: Any, path: str, count: Any) -> int:
    """The number of layers. RefusedError if this layer cannot become a product of so many."""
    kind = type(layer)
    if kind not in (*LINEAR, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding):
        raise RefusedError(
            f"{path}: a {kind.__name__} cannot become a product of layers; linear layers, convolutions and "
            f"embeddings can"
        )
    if layer._parameters.get("weight") is None:
        raise RefusedError(
            f"{path}: its weight is computed from other tensors, so it cannot be stored as factors"
        )
    if type(count) is not int or not 2 <= count <= MOST:
        raise RefusedError(f"{path}: a product has 2 to {MOST} layers, not {count!r}")
    if getattr(layer, "groups", 1) != 1:
        raise RefusedError(f"{path}: it has {layer.groups} groups; a product of layers has one")
    if getattr(layer, "max_norm", None) is not None:
        raise RefusedError(f"{path}: max_norm rescales rows of the weight, and a product of layers has none")
    return count


def build(layer: Any, count: int) -> nn.Sequential:
    """The layers in the order of the forward, without their tensors."""
    kind, bias = type(layer), layer._parameters.get("bias") is not None
    bare: dict[str, Any] = {"device": "meta"}
    if kind in LINEAR:
        layers = [nn.Linear(1, 1, bias=bias and k == count - 1, **bare) for k in range(count)]
        return nn.Sequential(*layers)
    if kind is nn.Embedding:
        rows = nn.Embedding(1, 1, scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse, **bare)
        rows.num_embeddings, rows.padding_idx = 0, layer.padding_idx  # 0: sizes.py reads it from the weight
        return nn.Sequential(rows, *(nn.Linear(1, 1, bias=False, **bare) for _ in range(count - 1)))
    same = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    if kind in TRANSPOSED:
        point: Any = CONVOLUTIONS[TRANSPOSED.index(kind)]
        points = [point(1, 1, 1, bias=False, **bare) for _ in range(count - 1)]
        same["output_padding"] = layer.output_padding
        return nn.Sequential(*points, kind(1, 1, layer.kernel_size, bias=bias, **same, **bare))
    first = kind(1, 1, layer.kernel_size, bias=False, **same, **bare)
    last = [kind(1, 1, 1, bias=bias and k == count - 2, **bare) for k in range(count - 1)]
    return nn.Sequential(first, *last)


def factor_forms(layer: Any, path: str, count: int, forms: Mapping[str, Form]) -> dict[str, tuple[Form, str]]:
    """The new layers' tensors, {name in the sequence: (form, origin)}."""
    found = list(factors(forms["weight"]))
    if len(found) != count:
        raise RefusedError(
            f"{path}.weight is stored as {len(found)} factor{'s' * (len(found) > 1)}, but {count} layers "
            f"were requested"
        )
    kind, pixels = type(layer), len(getattr(layer, "kernel_size", ()))
    if kind in (*LINEAR, *CONVOLUTIONS):  # the right factor is applied first
        weights = [with_ones(form, pixels * (len(form.shape) == 2)) for _, form in reversed(found)]
        origins = [where for where, _ in reversed(found)]
    else:
        # The left factor is applied first: it is an embedding's table, and its axis 0 is the inputs of a
        # transposed convolution.
        plain = 0 if kind is nn.Embedding else count - 1
        weights = [
            form if k == plain else with_ones(transposed(form), pixels) for k, (_, form) in enumerate(found)
        ]
        origins = [where for where, _ in found]
    pairs = enumerate(zip(weights, origins, strict=True))
    new = {f"{k}.weight": (form, f"weight {where}") for k, (form, where) in pairs}
    if "bias" in forms:
        new[f"{count - 1}.bias"] = (forms["bias"], "bias")
    return new
