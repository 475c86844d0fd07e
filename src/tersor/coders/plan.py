"""Plan: what a coder would make of a histogram, before it codes a symbol. Coder: how to plan and to read.

Sizes are known before coding (of rANS, a little less than the truth): choosing costs one coding, not four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ID_BITS = 3  # of the first byte; the coder's settings are above


class Plan(NamedTuple):
    """One way to code a given stream."""

    nbytes: int  # the stream will not be shorter
    write: Callable[[np.ndarray], bytes]  # symbols [N] uint8 -> the whole stream


class Coder(NamedTuple):
    """One row of the table CODERS: a static coder, which sees single symbols."""

    id: int
    plan: Callable[[np.ndarray], Plan | None]  # counts [256], N >= 1 in all; None where this coder cannot
    read: Callable[[int, memoryview, np.ndarray], None]  # settings, the whole stream, where its symbols go


def first_byte(coder_id: int, settings: int = 0) -> bytes:
    return bytes([coder_id | settings << ID_BITS])


class GridCoder(NamedTuple):
    """One row of the table GRID_CODERS: a coder that sees symbols as a matrix, perhaps masked."""

    id: int
    plan: Callable[[np.ndarray, int, np.ndarray | None], bytes | None]  # symbols [N], columns, mask -> stream
    read: Callable[
        [int, memoryview, int, int, np.ndarray | None], np.ndarray
    ]  # settings, stream, N, columns, mask
