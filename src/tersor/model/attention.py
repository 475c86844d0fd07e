"""Attention: nn.MultiheadAttention with a free head width, so that heads can be cut and the embedding stays.

out = W_o concat_h softmax(q_h k_h^T scale) v_h         Vaswani et al. 2017, section 3.2
H heads of width D, embedding width E         nn.MultiheadAttention needs H * D = E; here they are independent
scale                                         1 / sqrt(D) of the original layer; a cut of head channels does
                                              not change it, so the softmax keeps its temperature
State dict, call and outputs (up to rounding) are those of nn.MultiheadAttention. Nested tensors are refused.
The fused inference kernel, which needs H * D = E, is never used.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError


class Attention(nn.Module):
    """Multi-head attention over inputs [T, B, E], or [B, T, E] with batch_first, or [T, E]."""

    in_proj_weight: nn.Parameter | None  # [3 H D, E]: queries, keys, values; or three matrices:
    q_proj_weight: nn.Parameter | None  # [H D, E]
    k_proj_weight: nn.Parameter | None  # [H D, kdim]
    v_proj_weight: nn.Parameter | None  # [H D, vdim]
    in_proj_bias: nn.Parameter | None  # [3 H D]
    bias_k: nn.Parameter | None  # [1, 1, H D]: an extra key, and its value
    bias_v: nn.Parameter | None

    # nn.TransformerEncoderLayer reads this before it uses its fused kernel; False prevents that.
    _qkv_same_embed_dim = False

    def __init__(self, layer: nn.MultiheadAttention, num_heads: int = 0, head_dim: int = 0) -> None:
        """Takes over the parameters of `layer`. Give `num_heads` and `head_dim` if the layer was cut after it
        was made."""
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = layer.embed_dim, layer.kdim, layer.vdim
        self.num_heads, self.head_dim = num_heads or layer.num_heads, head_dim or layer.head_dim
        self.scale = self.head_dim**-0.5
        self.dropout, self.batch_first, self.add_zero_attn = (
            layer.dropout, layer.batch_first, layer.add_zero_attn,
        )  # fmt: skip
        for name in (
            "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k",
            "bias_v",
        ):  # fmt: skip
            self.register_parameter(name, layer._parameters.get(name))
        self.out_proj = layer.out_proj
        self.training = layer.training

    def forward(  # noqa: PLR0917  the call of nn.MultiheadAttention
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The outputs, and the attention weights [B, T, S], [B, H, T, S] or None, as nn.MultiheadAttention
        returns them. RefusedError for nested tensors and for masks of a wrong shape or dtype."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise RefusedError("attention: nested tensors are not supported; give padded tensors and a mask")
        if is_causal and attn_mask is None:
            raise RefusedError("attention: is_causal is only a hint about attn_mask; give attn_mask too")
        alone = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if alone:
            key = value = query  # one matrix product projects all three
        out, weights = self._attend(
            query, key, value, key_padding_mask, attn_mask, need_weights=need_weights, hint=is_causal
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return (out.transpose(0, 1) if self.batch_first else out), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None,
        *, need_weights: bool, hint: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Inputs [T, B, E], [S, B, kdim], [S, B, vdim]; outputs [T, B, E], weights [B, H, T, S] or None."""
        length, batch, _ = query.shape
        for name, given, fits in (
            ("attn_mask", mask, [(length, len(key)), (batch * self.num_heads, length, len(key))]),
            ("key_padding_mask", padding, [(batch, len(key))]),
        ):
            if given is not None and tuple(given.shape) not in fits:
                allowed = " or ".join(str(list(shape)) for shape in fits)
                raise RefusedError(
                    f"attention: {name} has shape {list(given.shape)}, but it must be {allowed}"
                )
        hint = hint and padding is None and not need_weights  # otherwise the mask itself is needed
        bias = None if hint else self._bias(padding, mask, batch, query.dtype)  # [B or 1, H or 1, T or 1, S]
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(1, batch, -1)])
            v = torch.cat([v, self.bias_v.expand(1, batch, -1)])
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if bias is not None and (more := k.shape[2] - bias.shape[3]):
            bias = F.pad(bias, (0, more))  # the added keys are visible to every query
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(2, 3)
            weights = (scores if bias is None else scores + bias).softmax(3)  # [B, H, T, S]
            if drop > 0:
                weights = F.dropout(weights, drop)
            seen = weights @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v, bias, drop, is_causal=hint, scale=self.scale)
        return self.out_proj(seen.permute(2, 0, 1, 3).reshape(length, batch, -1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values [T or S, B, H D]."""
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            matrices = cast(Any, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        elif query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, 2))
        else:
            matrices = self.in_proj_weight.chunk(3)
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True)]

    def _bias(
        self, padding: Tensor | None, mask: Tensor | None, batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The masks as a term that is added to the scores, [B or 1, H or 1, T or 1, S], from padding [B, S]
        and mask [T, S] or [B H, T, S]. None without masks."""
        bias = None
        if mask is not None:
            bias = added(mask, "attn_mask", dtype)
            bias = bias.unflatten(0, (batch, self.num_heads)) if bias.dim() == 3 else bias[None, None]
        if padding is not None:
            hidden = added(padding, "key_padding_mask", dtype)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return bias

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def added(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A mask as a term to add to scores: True becomes -inf, float masks are used unchanged."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise RefusedError(f"attention: {name} has dtype {mask.dtype}, but it must be bool or a float dtype")
    return mask.to(dtype)
