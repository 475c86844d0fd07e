"""Pool: one job after the other is read, worked on by all cores, and handed out in order.

held at once   jobs of at most BUDGET bytes: read, in work, or waiting for their turn; a larger one alone
Threads, for what takes long (coders, digests, tensors) lets go of the interpreter. The order, and so every
byte that is written, is the same for any number of them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from tersor.errors import SettingError
from tersor.threads import threads

BUDGET = 160_000_000  # bytes of tensors; what a step makes of those in work comes on top of it
AHEAD = 4  # jobs for each worker at once: many small tensors must not wait for one another

Item = TypeVar("Item")
Given = TypeVar("Given")
Found = TypeVar("Found")


def in_order(
    items: Iterable[Item],
    nbytes: Callable[[Item], int],
    read: Callable[[Item], Given],
    work: Callable[[Item, Given], Found],
    workers: int | None = None,
) -> Iterator[Found]:
    """work(item, read(item)) of each item, in order. `read` is called by the caller's thread, `work` by
    others; `nbytes` is what an item takes of the budget. The first error of either ends all."""
    count = check_workers(workers)
    pool = threads("jobs", count)
    held: deque[tuple[Future[Found], int]] = deque()
    room = BUDGET
    try:
        for item in items:
            need = nbytes(item)
            while held and (need > room or len(held) >= AHEAD * count):
                room += held[0][1]
                yield held.popleft()[0].result()
            held.append((pool.submit(work, item, read(item)), need))
            room -= need
        while held:
            yield held.popleft()[0].result()
    finally:  # after an error too nothing goes on behind the caller's back
        wait([future for future, _ in held if not future.cancel()])


def check_workers(workers: int | None) -> int:
    """How many threads: one for each core, unless told."""
    if workers is not None and workers < 1:
        raise SettingError(
            f"workers={workers}, but it is a number of threads: 1 or more. Leave it out for all cores"
        )
    return workers or os.cpu_count() or 1
