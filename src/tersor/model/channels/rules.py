"""Rules: the table of operators, by name, without the underscore of in-place ones.

An operator that is not listed freezes all that it touches, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from tersor.model.channels import layer_rules as layers
from tersor.model.channels import shape_rules as shapes
from tersor.model.channels.call import Call, Labels

Rule = Callable[[Call], Labels]


def table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **table(layers.convolution, "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d"),
    **table(layers.convolution, "conv_transpose3d"),
    **table(layers.linear, "linear"),
    **table(layers.product, "matmul mm bmm mv dot"),
    **table(layers.added_product, "addmm baddbmm"),
    **table(layers.einsum, "einsum"),
    **table(layers.batch_norm, "batch_norm instance_norm _native_batch_norm_legit_no_training"),
    **table(layers.trailing_norm, "layer_norm rms_norm"),
    **table(layers.group_norm, "group_norm"),
    **table(layers.attention, "scaled_dot_product_attention"),
    **table(layers.normalized, "softmax log_softmax _softmax"),
    **table(layers.embedding, "embedding"),
    **table(layers.reduced, "sum mean amax amin max min any all var std var_mean logsumexp prod"),
    **table(layers.reduced, "linalg_vector_norm"),
    **table(layers.cumulative, "cumsum cumprod sort roll flip"),
    **table(shapes.pooled, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d"),
    **table(shapes.pooled, "max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d"),
    **table(shapes.pooled, "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d"),
    **table(shapes.pooled, "upsample_nearest2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"),
    **table(shapes.pooled, "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    **table(shapes.reshape, "view reshape flatten unflatten view_as reshape_as _unsafe_view ravel"),
    **table(shapes.permute, "permute"),
    **table(shapes.transpose, "transpose swapaxes swapdims t mT adjoint"),
    **table(shapes.reverse, "numpy_T"),
    **table(shapes.moved, "movedim moveaxis"),
    **table(shapes.unsqueeze, "unsqueeze"),
    **table(shapes.squeeze, "squeeze"),
    **table(shapes.expand, "expand repeat tile broadcast_to"),
    **table(shapes.repeated, "repeat_interleave"),
    **table(shapes.joined, "cat concat concatenate"),
    **table(shapes.stack, "stack"),
    **table(shapes.split, "split split_with_sizes chunk tensor_split"),
    **table(shapes.unbind, "unbind"),
    **table(shapes.select, "select"),
    **table(shapes.sliced, "slice narrow"),
    **table(shapes.index, "index"),
    **table(shapes.index_select, "index_select"),
    **table(shapes.padded, "pad constant_pad_nd"),
    **table(shapes.pixel_shuffle, "pixel_shuffle"),
    **table(shapes.pixel_unshuffle, "pixel_unshuffle"),
    **table(shapes.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **table(layers.halved, "glu"),
    **table(layers.slopes, "prelu"),
    **table(layers.weight_norm, "_weight_norm _weight_norm_interface"),
    **table(layers.recurrent, "lstm gru rnn_tanh rnn_relu"),
    **table(shapes.made, "zeros ones full empty new_zeros new_ones new_full new_empty"),
    **table(shapes.counted, "arange scalar_tensor tensor linspace eye meshgrid"),
    **table(shapes.cornered, "tril triu"),
    **table(shapes.unfolded, "unfold"),
    **table(shapes.same, "relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu"),
    **table(shapes.same, "selu celu softplus softsign mish log_sigmoid dropout feature_dropout"),
    **table(shapes.same, "alpha_dropout contiguous clone alias detach to type_as _to_copy lift_fresh_copy"),
    **table(shapes.same, "exp expm1 log log1p sqrt rsqrt abs neg sin cos erf sign reciprocal square floor"),
    **table(shapes.same, "ceil round trunc logical_not bitwise_not isnan zero zeros_like ones_like"),
    **table(shapes.same, "full_like empty_like rand_like nan_to_num softshrink hardshrink tanhshrink"),
    **table(shapes.same, "threshold rrelu atan requires_grad_ numpy resolve_conj positive float"),
    **table(shapes.broadcast, "add sub rsub mul div pow maximum minimum where addcmul addcdiv lerp eq ne lt"),
    **table(shapes.broadcast, "le gt ge copy expand_as masked_fill clamp clamp_min clamp_max fill fmod"),
    **table(shapes.broadcast, "remainder atan2 bitwise_and bitwise_or logical_and logical_or logical_xor"),
    **table(shapes.broadcast, "__and__ __or__ floor_divide"),
}  # fmt: skip
