"""Fast path: torch's transformer layers in eval mode can be kept from their fused kernel.

The kernel calls none of the layer's parts, and where a mask pads it computes on nested tensors without sizes.
No hook sees what such a kernel reads, and padded positions come out as zeros, as in no training, trace or
exported file. So all that Tersor looks at and scores is computed without it: task.py, batches.py, watch.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside: list[bool] = []  # for each that is inside, in any thread, the process's setting before the first


@contextmanager
def no_fast_path() -> Iterator[None]:
    """torch's transformer layers call their parts, in this process, until the last that is inside has left:
    threads overlap. Compiled code cannot set that."""
    if torch.compiler.is_compiling():
        yield
        return
    mha = torch.backends.mha
    with _lock:
        _inside.append(_inside[0] if _inside else mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            mha.set_fastpath_enabled(before and not _inside)
