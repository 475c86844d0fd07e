"""Program layers: the stock layer for an operator of a graph, from its arguments and its tensors.

conv2d(x, w [O, I/G, K, K], b, stride, padding, dilation, G) -> nn.Conv2d(I, O, K, ...), its tensors on meta
The tensors are put in later (program_builder.py); nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.model.graph import arguments, first, op_name


def empty(kind: Callable[..., nn.Module], *args: Any, **settings: Any) -> nn.Module:
    with torch.device("meta"):  # its tensors are put in later; none are drawn
        return kind(*args, **settings)


def conv(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module:
    o, i, *kernel = own["weight"].shape
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    settings = {key: plain(given[key]) for key in ("stride", "padding", "dilation", "groups")}
    return empty(kind, i * given["groups"], o, tuple(kernel), bias="bias" in own, **settings)


def conv_transpose(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module:
    i, o, *kernel = own["weight"].shape
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(kernel) - 1]
    keys = ("stride", "padding", "output_padding", "dilation", "groups")
    settings = {key: plain(given[key]) for key in keys}
    return empty(kind, i, o * given["groups"], tuple(kernel), bias="bias" in own, **settings)


def plain(item: Any) -> Any:
    """Lists of the graph as the tuples of a layer; one number stands for all axes."""
    if not isinstance(item, (list, tuple)):
        return item
    return item[0] if len(item) == 1 else tuple(item)


def linear(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module:
    o, i = own["weight"].shape
    return empty(nn.Linear, i, o, bias="bias" in own)


def batch_norm(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module | None:
    if ("weight" in own) != ("bias" in own) or ("running_mean" in own) != ("running_var" in own):
        return None  # a call of the function: the layer has both or none
    dims = len(given["input"].meta["val"].shape)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    size = next(iter(own.values())).shape[0]
    momentum = given["momentum"] or None  # a running average (None) is 0.0 in a graph of eval mode
    new: Any = empty(kind, size, given["eps"], momentum, "weight" in own, "running_mean" in own)
    if new.track_running_stats:
        new.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return new


def layer_norm(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module | None:
    if "weight" not in own:
        return None
    return empty(nn.LayerNorm, tuple(own["weight"].shape), given["eps"], bias="bias" in own)


def group_norm(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module | None:
    if len(own) < 2:
        return None
    return empty(nn.GroupNorm, given["num_groups"], own["weight"].shape[0], given["eps"])


DROPOUTS = {"dropout": nn.Dropout, "alpha_dropout": nn.AlphaDropout,
            "feature_alpha_dropout": nn.FeatureAlphaDropout}  # fmt: skip
FEATURES = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}  # axes of the input -> feature_dropout


def dropout_of(node: fx.Node) -> nn.Module | None:
    """The dropout that an operator is; None for other operators."""
    op, given = op_name(node), arguments(node)
    name = op.removesuffix("_")
    if name == "feature_dropout":
        kind: Any = FEATURES.get(first(node).meta["val"].ndim)
    else:
        kind = DROPOUTS.get(name)
    return None if kind is None else kind(given["p"], inplace=op != name)


# Operator -> the stock layer, from its arguments and its tensors; None if no layer does that.
LAYERS: dict[str, Any] = {
    "linear": linear, "batch_norm": batch_norm, "layer_norm": layer_norm, "group_norm": group_norm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv_transpose),
}  # fmt: skip
