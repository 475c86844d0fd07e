"""Sizes: the integers of a stock layer that follow from the shapes of its tensors. One table for all layers.

weight [6, 3, 5, 5] of a convolution of 2 groups -> out_channels 6, in_channels 6
Several tensors give the same number (weight and bias, all gates). If they disagree, the cut is incomplete
and is refused with both numbers. Integers that do not follow from shapes (groups, heads) have to be set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tersor.errors import RefusedError
from tersor.model.attention import Attention

Sizes = dict[str, Any]  # attribute -> an integer, or a tuple of them
# Names of the stored tensor of a computed one: prune and spectral_norm, weight_norm of torch.nn.utils.
STORED = ("{}", "{}_orig", "{}_v")


class LayerSizes:
    """A layer and the present shapes of its tensors."""

    def __init__(self, path: str, module: Any, asked: frozenset[str] = frozenset()) -> None:
        self.path, self.module = path or type(module).__name__, module
        self.asked = asked  # attributes that were set by name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if the layer has none of this name."""
        held = {**self.module._parameters, **self.module._buffers}
        for stored in (pattern.format(name) for pattern in STORED):
            if held.get(stored) is not None:
                return tuple(held[stored].shape)
        with torch.no_grad():  # a parametrization computes it
            value = getattr(self.module, name, None) if name not in held else None
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def along(self, **places: int) -> int | None:
        """The common size of these tensors along these axes; None if the layer has none of them. RefusedError
        if they differ."""
        found = {}
        for name, axis in places.items():
            shape = self.shape(name)
            if shape is not None and len(shape) > axis:
                found[f"{name} along axis {axis}"] = shape[axis]
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{place} has {size}" for place, size in found.items())
            self.refuse(f"{listed}; they must be cut together")
        return next(iter(found.values()), None)

    def divided(self, what: str, size: int, by: int, advice: str) -> int:
        if by < 1 or size % by:
            self.refuse(f"{size} {what} are not divisible by {by}; {advice}")
        return size // by

    def refuse(self, why: str) -> None:
        raise RefusedError(f"{self.path}: {why}")


def linear(layer: LayerSizes) -> Sizes:
    return {"in_features": layer.along(weight=1), "out_features": layer.along(weight=0, bias=0)}


def bilinear(layer: LayerSizes) -> Sizes:
    return {
        "in1_features": layer.along(weight=1), "in2_features": layer.along(weight=2),
        "out_features": layer.along(weight=0, bias=0),
    }  # fmt: skip


def convolution(layer: LayerSizes) -> Sizes:
    """weight [O, I / G, ...]; transposed [I, O / G, ...]."""
    module, turned = layer.module, layer.module.transposed
    shape = layer.shape("weight") or ()
    if shape[2:] != tuple(module.kernel_size):
        layer.refuse(f"the kernel {list(module.kernel_size)} became {list(shape[2:])}; only channels are cut")
    wide = (layer.along(weight=0) if turned else layer.along(weight=0, bias=0)) or 0
    groups = module.groups
    before = module.in_channels if turned else module.out_channels
    # Groups of one channel are cut with their channels, so the shapes of a depthwise layer give the groups.
    each = before // groups
    depthwise = groups > 1 and groups in (module.in_channels, module.out_channels)
    if depthwise and "groups" not in layer.asked and wide % each == 0:
        groups = wide // each
    layer.divided("channels", wide, groups, f"set the number of groups: Set({layer.path!r}, 'groups', n)")
    across = shape[1] * groups
    if turned and (bias := layer.along(bias=0)) not in (None, across):
        layer.refuse(f"weight has {across} output channels, bias has {bias}; they must be cut together")
    ins, outs = (wide, across) if turned else (across, wide)
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


def features(layer: LayerSizes) -> Sizes:
    return {"num_features": layer.along(weight=0, bias=0, running_mean=0, running_var=0)}


def grouped_norm(layer: LayerSizes) -> Sizes:
    count = layer.along(weight=0, bias=0)
    if count is not None:
        advice = f"set the number of groups: Set({layer.path!r}, 'num_groups', n)"
        layer.divided("channels", count, layer.module.num_groups, advice)
    return {"num_channels": count}


def trailing_norm(layer: LayerSizes) -> Sizes:
    shape, bias = layer.shape("weight"), layer.shape("bias")
    if None not in (shape, bias) and shape != bias:
        layer.refuse(
            f"weight has shape {list(shape or ())}, bias {list(bias or ())}; they must be cut together"
        )
    return {"normalized_shape": shape}


def table(layer: LayerSizes) -> Sizes:
    module, rows = layer.module, layer.along(weight=0)
    cut = module.num_embeddings not in (0, rows)  # 0: a new layer, whose number of rows is not set yet
    if cut and module.padding_idx is not None and "padding_idx" not in layer.asked:
        layer.refuse(
            f"rows were cut, and row {module.padding_idx} was the padding row; set the new index: "
            f"Set({layer.path!r}, 'padding_idx', n)"
        )
    return {"num_embeddings": rows, "embedding_dim": layer.along(weight=1)}


def slopes(layer: LayerSizes) -> Sizes:
    return {"num_parameters": layer.along(weight=0)}


def recurrent(layer: LayerSizes) -> Sizes:
    """weight_ih [K H, I], weight_hh [K H, H or P], weight_hr [P, H], for K gates; later layers read D P."""
    module = layer.module
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    ends = ("", "_reverse") if module.bidirectional else ("",)
    names = [[f"l{k}{end}" for end in ends] for k in range(module.num_layers)]
    every = [name for layer_names in names for name in layer_names]
    gated = layer.along(
        **{f"{key}_{name}": 0 for name in every for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    )
    hidden = layer.divided("rows", gated or 0, gates, "all gates must be cut equally")
    seen = layer.along(**{f"weight_hh_{name}": 1 for name in every})
    projected = layer.along(**{f"weight_hr_{name}": 0 for name in every})
    inner = layer.along(**{f"weight_hr_{name}": 1 for name in every})
    if (projected or hidden) != seen or inner not in (None, hidden):
        layer.refuse(
            f"{hidden} hidden units, but the recurrent weights read {seen}: they must be cut together"
        )
    deeper = layer.along(**{f"weight_ih_{name}": 1 for layer_names in names[1:] for name in layer_names})
    if deeper not in (None, len(ends) * (seen or 0)):
        layer.refuse(f"layers have {len(ends) * (seen or 0)} outputs, but the next layer reads {deeper}")
    ins = layer.along(**{f"weight_ih_{name}": 1 for name in names[0]})
    return {"input_size": ins, "hidden_size": hidden, "proj_size": projected or 0}


def cell(layer: LayerSizes) -> Sizes:
    gates = {nn.LSTMCell: 4, nn.GRUCell: 3}.get(type(layer.module), 1)
    gated = layer.along(weight_ih=0, weight_hh=0, bias_ih=0, bias_hh=0)
    hidden = layer.divided("rows", gated or 0, gates, "all gates must be cut equally")
    if hidden != (seen := layer.along(weight_hh=1)):
        layer.refuse(
            f"{hidden} hidden units, but the recurrent weight reads {seen}: they must be cut together"
        )
    return {"input_size": layer.along(weight_ih=1), "hidden_size": hidden}


def projections(layer: LayerSizes) -> tuple[int, int, Sizes]:
    """Sizes of attention: (channels of the stream, channels of all heads, those of keys and values)."""
    out = LayerSizes(f"{layer.path}.out_proj", layer.module.out_proj)
    stream = layer.along(in_proj_weight=1, q_proj_weight=1)
    stacked = layer.along(in_proj_weight=0, in_proj_bias=0)
    own = layer.along(q_proj_weight=0, k_proj_weight=0, v_proj_weight=0, bias_k=2, bias_v=2)
    inner = layer.divided("rows", stacked, 3, "cut queries, keys and values together") if stacked else own
    seen, made = out.along(weight=1), out.along(weight=0, bias=0)
    if own not in (None, inner) or seen not in (None, inner):
        layer.refuse(f"heads have {inner} channels, out_proj reads {seen}: they must be cut together")
    if made not in (None, stream) and not isinstance(layer.module, Attention):
        layer.refuse(f"queries read {stream} channels, out_proj writes {made}: they must be cut together")
    others = {"kdim": layer.along(k_proj_weight=1) or stream, "vdim": layer.along(v_proj_weight=1) or stream}
    return stream or 0, inner or 0, others


def torch_attention(layer: LayerSizes) -> Sizes:
    stream, inner, others = projections(layer)
    if stream != inner:
        layer.refuse(
            f"nn.MultiheadAttention needs as many channels in its heads as in its stream, but they would "
            f"have {inner} and {stream}. Replace it first: Replace({layer.path!r}, 'attention')"
        )
    heads = layer.module.num_heads
    width = layer.divided(
        "channels", inner, heads, f"set the number of heads: Set({layer.path!r}, 'num_heads', n)"
    )
    return {"embed_dim": stream, "head_dim": width, **others}


def free_attention(layer: LayerSizes) -> Sizes:
    """The number of heads, from the channels and the head width; or the width, if the heads were set."""
    module = layer.module
    stream, inner, others = projections(layer)
    if "num_heads" in layer.asked:
        advice = f"{module.num_heads} heads were set"
        heads, width = module.num_heads, layer.divided("channels", inner, module.num_heads, advice)
    else:
        advice = f"set the number of heads: Set({layer.path!r}, 'num_heads', n)"
        heads, width = layer.divided("channels", inner, module.head_dim, advice), module.head_dim
    return {"embed_dim": stream, "num_heads": heads, "head_dim": width, **others}


TABLE: tuple[tuple[Any, Callable[[LayerSizes], Sizes]], ...] = (
    (nn.Linear, linear),
    (nn.Bilinear, bilinear),
    (nn.modules.conv._ConvNd, convolution),
    (nn.modules.batchnorm._NormBase, features),  # batch and instance norms
    (nn.GroupNorm, grouped_norm),
    ((nn.LayerNorm, nn.RMSNorm), trailing_norm),
    ((nn.Embedding, nn.EmbeddingBag), table),
    (nn.PReLU, slopes),
    (nn.RNNBase, recurrent),
    (nn.RNNCellBase, cell),
    (nn.MultiheadAttention, torch_attention),
    (Attention, free_attention),
)


def sizes_of(path: str, module: nn.Module, asked: frozenset[str] = frozenset()) -> Sizes:
    """The integers that follow from the shapes of this layer's tensors, by attribute; empty for modules that
    are not in the table.

    `asked`: attributes that were set, which the shapes have to agree with. RefusedError if tensors disagree.
    """
    rule = next((rule for kinds, rule in TABLE if isinstance(module, kinds)), None)
    if rule is None:
        return {}
    return {key: value for key, value in rule(LayerSizes(path, module, asked)).items() if value is not None}
