"""Pages: large arrays allocated directly from the operating system.

A page takes memory only when it is first written, and all memory goes back when the array is freed. The C
library's allocator may keep freed memory instead, separately for every thread.
"""

from __future__ import annotations

import mmap

import numpy as np

LARGE = 4 << 20  # bytes: smaller arrays are frequent, and the C library allocates them faster


def pages(nbytes: int) -> np.ndarray:
    """An uninitialized array uint8 [nbytes]."""
    if nbytes < LARGE:
        return np.empty(nbytes, dtype=np.uint8)
    # By default Python's mmap would share the memory with child processes.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=np.uint8)
