"""Pages: large arrays straight from the system.

A page of them takes memory when it is first written, not before, and all of it goes back when the array is
dropped; what the C library hands out it may keep for later, as much again for every thread.
"""

from __future__ import annotations

import mmap

import numpy as np

LARGE = 4 << 20  # bytes: smaller arrays come often, and are quicker to have from the C library


def pages(nbytes: int) -> np.ndarray:
    """An array uint8 [nbytes], not set to anything."""
    if nbytes < LARGE:
        return np.empty(nbytes, dtype=np.uint8)
    # Python's own choice would be memory that child processes share.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=np.uint8)
