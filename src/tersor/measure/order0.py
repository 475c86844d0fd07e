"""Order 0: the size of an array under a coder that sees one symbol at a time, without its table.

bits = sum over byte planes of N * H(histogram of the plane)        a code of one byte or a mask has one plane
Fewer than FEW floats count as they are: 256 counts a plane would be no fair bound. All tables, pages and
notes take this number. A coder that uses neighbors or packs eight elements of a mask may go below it.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tersor.forms.form import SLICE, as_bytes
from tersor.maths.statistics import entropy_bits

FEW = 4096  # floats


def order0_bits(array: Tensor) -> float:
    """Order-0 entropy of the elements' bytes, plane by plane, in bits."""
    if array.numel() < FEW and (array.is_floating_point() or array.is_complex()):
        return 8.0 * array.nbytes
    width = array.dtype.itemsize
    data, counts = as_bytes(array), np.zeros((width, 256), dtype=np.int64)
    for begin in range(0, len(data), SLICE * width):
        piece = data[begin : begin + SLICE * width]
        for k in range(width):
            counts[k] += np.bincount(piece[k::width], minlength=256)
    return sum(float(row.sum()) * entropy_bits(row[row > 0].tolist()) for row in counts)
