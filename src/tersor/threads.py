"""Threads: pools that stay open, and whether this process is the first one of a launcher.

Starting threads takes as long as decoding a small tensor, so pools are kept. Each kind of work has its own
pool: a task of one kind may wait for tasks of another kind, never for tasks of its own.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def threads(kind: str, count: int = 0) -> ThreadPoolExecutor:
    """The pool for this kind of work: `count` threads, or one for each core if it is 0."""
    return ThreadPoolExecutor(count or os.cpu_count() or 1, thread_name_prefix=f"tersor-{kind}")


def first() -> bool:
    """Whether this process writes files and prints. Under torchrun or accelerate launch, each of several
    processes runs the recipe."""
    return int(os.environ.get("RANK", "0")) == 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # threads do not survive a fork
