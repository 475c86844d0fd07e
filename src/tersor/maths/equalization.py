"""Equalization: scales of the channels between two layers, so that each channel has equal ranges in both.

W1' = W1 / s, b1' = b1 / s, W2' = W2 s       the same function if f(x / s) = f(x) / s between them
s_i = sqrt(r1_i / r2_i)                      r: the largest |weight| of channel i in each; then both are
                                             sqrt(r1_i r2_i). Nagel et al. 2019, section 4.1, equation 11
Powers of two, so that float arithmetic gives the same bits: ranges then agree within a factor of 2. A layer
in two pairs needs several sweeps. Cost: one pass over the layers' ranges for each sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SWEEPS = 20  # at most
SETTLED = 0.05  # in powers of two: sweeps end where no scale moves more
LIMIT = 12  # largest power of two, for floats of 16 bits


def equalizing(ranges: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The powers of two log2(s) [C] of each pair, float64 integers.

    `ranges`: of each layer the largest |weight| between each output and each input [O, I], 0 where there is
    none, as in grouped convolutions. `pairs`: numbers of two layers, the second reads the first; C is the
    number of outputs of the first and of inputs of the second. A channel without weights on one side stays.
    """
    logs = [range.double().log2() for range in ranges]  # of 0: -inf
    found = [torch.zeros(len(logs[first]), dtype=torch.float64) for first, _ in pairs]
    for _ in range(SWEEPS):
        moved = 0.0
        for scale, (first, second) in zip(found, pairs, strict=True):
            rows, columns = logs[first].amax(1), logs[second].amax(0)  # [C], [C]
            wanted = scale + torch.where(rows.isfinite() & columns.isfinite(), (rows - columns) / 2, 0)
            move = wanted.clamp(-LIMIT, LIMIT) - scale
            scale += move
            logs[first] = logs[first] - move[:, None]
            logs[second] = logs[second] + move
            moved = max([moved, *move.abs().tolist()])
        if moved <= SETTLED:
            break
    return [scale.round() for scale in found]
