"""NaN rules: how ATen operators propagate NaN ("depends on the input") and carry a permutation of channels.

Keyed by an operator's name; its in-place spelling (`relu_`) is the same. An operator in no table is assumed
to mix all elements. Views need no entry: they are recognized by the memory that they share.
"""

from __future__ import annotations

from torch import fx

from tersor.model.graph import op_name


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elementwise: each element of the result depends on one element of each argument, by the same function. With
# one tensor argument, these treat all units alike. Every NaN is kept.
EACH = names(
    "add sub rsub mul div neg abs square sqrt rsqrt exp erf sin cos relu relu6 hardtanh leaky_relu elu celu "
    "selu gelu silu mish hardswish hardsigmoid softplus log_sigmoid tanh sigmoid clamp clamp_min clamp_max "
    "dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous to lift_fresh_copy "
    "detach"
)  # fmt: skip
# The same but for the last 1, 2 or 3 axes, which are pooled. Every NaN is kept.
POOLS = {
    f"{kind}_pool{axes}d": axes
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for axes in (1, 2, 3)
}  # fmt: skip
# The same elements in the same order, in another shape.
RESHAPES = names("view reshape flatten unflatten squeeze unsqueeze _unsafe_view")
# A result element without NaN depends on no NaN. Elements may be combined or left out.
OTHERS = names(
    "softmax log_softmax batch_norm layer_norm group_norm instance_norm rms_norm prelu glu maximum minimum "
    "cat stack mean sum amax amin cumsum linalg_vector_norm where masked_fill index_select index gather "
    "repeat roll flip tril triu pixel_shuffle channel_shuffle upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d copy fill zero"
)  # fmt: skip
PASSING = EACH | POOLS.keys() | RESHAPES | OTHERS
# Products of two tensors, with the position of the first among the arguments; further tensors are added.
FACTORS = {
    **{f"conv{kind}{axes}d": 0 for kind in ("", "_transpose") for axes in (1, 2, 3)},
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), 0), "addmm": 1, "baddbmm": 1,
}  # fmt: skip
SHAPES = names("new_ones new_zeros new_full ones_like zeros_like full_like")  # read shapes, not values
LAYERS = frozenset(("linear", "conv1d", "conv2d", "conv3d"))  # weight [O, I, ...]: rows and columns are units
# Batched along axis 0: arguments as long as the result there do not mix indices of axis 0.
APART = frozenset(("scaled_dot_product_attention",))


def base(node: fx.Node) -> str:
    """The ATen operator's name, without the "_" of an in-place one; "" if it is not one of torch's own."""
    own = getattr(node.target, "namespace", "") == "aten"
    return op_name(node).removesuffix("_") if own else ""
