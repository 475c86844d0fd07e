"""Layer rows: what the weight of a layer is multiplied with, and what it gives, row by row.

x [N, G, I]     of a linear layer each input vector, without padding tokens; of a convolution in G groups what
                each group's kernel covers, borders included
y [N, G, O]     the outputs of the same rows
Of a convolution about POSITIONS positions of a batch count, spread evenly over the images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.logits import is_encoder_decoder, unpadded
from tersor.model.scaled_inputs import ScaledInputs

STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d)  # the layers that have rows
POSITIONS = 4096  # positions of a convolution used per batch: more would change an estimate little
AT_ONCE = 1 << 24  # elements of unfolded images held at once


def tokens(x: Tensor, batch: Any) -> Tensor:
    """[N, 1, C] of x [..., C], without padding."""
    mask = unpadded(batch, tuple(x.shape[:2]), x.device, decoder=False) if x.ndim == 3 else None
    return (x if mask is None or is_encoder_decoder(None, batch) else x[mask]).reshape(-1, 1, x.shape[-1])


def input_rows(module: Any, x: Tensor, batch: Any = None) -> Tensor:
    """What each group's weight is multiplied with, [N, G, I]."""
    if isinstance(module, nn.Linear):
        return tokens(x * module.factor if isinstance(module, ScaledInputs) else x, batch)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The layer's own argument for F.pad, which it has for every padding mode.
    image = F.pad(x, module._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if len(kernel) == 1:  # a 1-D convolution is a 2-D one of height 1
        image, kernel, dilation, stride = image.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    size = image.shape[1] * math.prod(kernel) * math.prod(image.shape[2:])
    rows, positions, first, step = [], 0, 0, 0
    for part in image.split(max(1, AT_ONCE // size)):
        patches = F.unfold(part, kernel, dilation=dilation, stride=stride).transpose(1, 2)  # [B, P, I]
        positions = patches.shape[1]
        step = step or stride_of(len(image), positions)
        flat = patches.reshape(-1, patches.shape[2])
        rows.append(flat[-first % step :: step])
        first += len(flat)
    return torch.cat(rows).unflatten(1, (module.groups, -1))


def output_rows(module: Any, y: Tensor, batch: Any = None) -> Tensor:
    """[N, G, O], at the same positions."""
    if isinstance(module, nn.Linear):
        return tokens(y, batch)
    rows = y.flatten(2).transpose(1, 2)  # [B, P, O]
    step = stride_of(*rows.shape[:2])
    return rows.reshape(-1, rows.shape[2])[::step].unflatten(1, (module.groups, -1))


def stride_of(images: int, positions: int) -> int:
    """Every how many positions one counts, so that about POSITIONS of all do. It has no divisor in common
    with the positions of an image: a multiple of the width would always meet the same column."""
    step = max(1, -(-images * positions // POSITIONS))
    while math.gcd(step, positions) > 1:
        step += 1
    return step
