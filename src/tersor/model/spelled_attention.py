"""Spelled attention: scaled_dot_product_attention in single operators, so that its inside can be rounded.

probabilities = softmax(scale q k^T + mask)      out = probabilities v      Vaswani et al. 2017, section 3.2
scale multiplies the product, not the queries, which stay on their grid. A query that may see no key gets
zeros, as from the function itself. Cost: memory for the probabilities [..., T, S].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

INSIDE = "<softmax"  # after the name of the edge that attention makes: its probabilities


def spelled_attention(  # noqa: PLR0917  the call of torch's function
    rounded: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Queries [..., T, D], keys [..., S, D], values [..., S, E]; outputs [..., T, E].

    `rounded` is applied to the probabilities. The rest is the call of F.scaled_dot_product_attention.
    """
    if enable_gqa:
        key, value = (repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seeing = None
    if is_causal:
        whole = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        scores = scores + penalty(whole.tril(), scores.dtype)
    elif attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        seeing = seen.any(-1, keepdim=True)
        if attn_mask.dtype == torch.bool:
            scores = scores + penalty(attn_mask, scores.dtype)
        else:
            scores = scores + attn_mask.clamp_min(torch.finfo(attn_mask.dtype).min)
    out = F.dropout(rounded(scores.softmax(-1)), dropout_p) @ value
    return out if seeing is None else out * seeing


def penalty(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only those seen count. Finite: a row of -inf would give NaN."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def repeated(x: Tensor, times: int) -> Tensor:
    """Each head [..., H, S, D] as many times in a row: moved by views, which runtimes see through."""
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)
