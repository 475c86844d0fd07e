"""Pool: reads items one after the other, processes them on all cores, and yields results in order.

memory   at most BUDGET bytes of items that are read, in work or waiting to be yielded; a larger item alone
Threads suffice, since the slow work (coders, digests, tensor operations) releases the GIL. The order, and so
every byte that is written, is the same for any number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import Generic, TypeVar

from tersor.errors import SettingError
from tersor.threads import threads

BUDGET = 160_000_000  # bytes of tensors; temporaries of a step are not counted
AHEAD = 4  # jobs per worker in flight, so that a slow one does not stall many small ones

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
    """work(item, read(item)) for each item, in order. `read` runs in the caller's thread, `work` in other
    threads, and in the caller's while it waits. `nbytes` is the memory of an item, counted against BUDGET.
    The first error of either is raised."""
    count = check_workers(workers)
    held: deque[Job[Found]] = deque()
    room = BUDGET
    try:
        for item in items:
            need = nbytes(item)
            while held and (need > room or len(held) >= AHEAD * count):
                room += held[0].nbytes
                yield first_of(held)
            held.append(Job(partial(work, item, read(item)), need, count - 1))
            room -= need
        while held:
            yield first_of(held)
    finally:  # after an error, too, no thread keeps running
        wait([job.future for job in held if not job.future.cancel()])


class Job(Generic[Found]):
    """One unit of work. One of `others` threads runs it, or the caller."""

    def __init__(self, work: Callable[[], Found], nbytes: int, others: int) -> None:
        self.work, self.nbytes = [work], nbytes
        self.future: Future[Found] = threads("jobs", others).submit(self.run) if others else Future()

    def run(self) -> Found:
        return self.work.pop()()  # pop: the item that was read is dropped with the call

    def run_here(self) -> bool:
        """Run the job in this thread, unless another thread has started it. Returns whether it ran."""
        if not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self.run())
        except Exception as error:  # kept until its turn, like errors of other threads; Ctrl-C is raised now
            self.future.set_exception(error)
        return True


def first_of(held: deque[Job[Found]]) -> Found:
    """Remove the first job and return its result. The caller runs waiting jobs until the result is there."""
    first = held[0]
    while not first.future.done() and any(job.run_here() for job in held):
        pass
    held.popleft()
    return first.future.result()


def check_workers(workers: int | None) -> int:
    """The number of threads; default: one per core. SettingError below 1."""
    if workers is not None and workers < 1:
        raise SettingError(
            f"workers={workers}, but it is a number of threads: 1 or more. Leave it out for all cores"
        )
    return workers or os.cpu_count() or 1
