"""Threads and processes: pools that stay, for to start threads takes as long as to decode a small tensor;
which of the processes of a launcher this is.

A pool for each kind of work, so that a job of one kind may wait for jobs of another, never for its own.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def threads(kind: str, count: int = 0) -> ThreadPoolExecutor:
    """`count` threads, one for each core if it is 0, that do this kind of work."""
    return ThreadPoolExecutor(count or os.cpu_count() or 1, thread_name_prefix=f"tersor-{kind}")


def first() -> bool:
    """Whether this process is the one that writes and speaks: under torchrun or accelerate launch each of
    several runs the recipe."""
    return int(os.environ.get("RANK", "0")) == 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # threads do not survive a fork
