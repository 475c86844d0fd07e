"""Soft rounding: a weight between two levels of its grid, while it is learned which of the two it takes.

code = below + h      h = clamp(1.2 sigmoid(v) - 0.1, 0, 1): 0 is down, 1 is up      AdaRound (Nagel 2020)
settled               h is 0 or 1 for good: those nearest to an end first, so that the others adapt to them.
                      Progressive rounding (TesseraQ, Li 2024), in place of AdaRound's price of a weight in
                      between, whose strength would have to be found for each network
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid, which the rectification cuts to 0 and 1


def upward(v: Tensor) -> Tensor:
    """h, the share of the way up."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse(h: Tensor) -> Tensor:
    """The v of a share of the way up, 0 to 1."""
    return ((h - GAMMA) / (ZETA - h)).log()


def pair(codes: Tensor, exact: Tensor, low: int, high: int) -> Tensor:
    """The lower of two neighboring codes: the given code, and the one beside it towards `exact`, the float
    weight in units of codes. At an end of the grid low..high, the one beside it inside."""
    return torch.where(exact > codes, codes, codes - 1).clamp(low, high - 1)


def settled(v: Tensor, already: Tensor, count: int) -> Tensor:
    """Where h is 0 or 1 for good, bool: `count` of the weights, among them those that are `already`."""
    far = (v.sigmoid() - 0.5).abs().masked_fill(already, torch.inf)
    at = far.flatten().topk(count, sorted=False).indices
    return already.flatten().index_fill(0, at, True).reshape(already.shape)
