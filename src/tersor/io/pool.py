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
from functools import partial
from typing import Generic, TypeVar

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
    others and, while it waits, by it too; `nbytes` is what an item takes of the budget. The first error of
    either ends all."""
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
    finally:  # after an error too nothing goes on behind the caller's back
        wait([job.future for job in held if not job.future.cancel()])


class Job(Generic[Found]):
    """Work that one of so many other threads, or the caller's, does when its turn comes."""

    def __init__(self, work: Callable[[], Found], nbytes: int, others: int) -> None:
        self.work, self.nbytes = [work], nbytes
        self.future: Future[Found] = threads("jobs", others).submit(self.run) if others else Future()

    def run(self) -> Found:
        return self.work.pop()()  # and what was read is dropped with it

    def taken(self) -> bool:
        """Whether nobody had begun it, and the caller has done it now."""
        if not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self.run())
        except Exception as error:  # raised when its turn comes, as those of other threads are; Ctrl-C now
            self.future.set_exception(error)
        return True


def first_of(held: deque[Job[Found]]) -> Found:
    """The result of the first job, which leaves the row. As long as it is not there the caller works, too."""
    first = held[0]
    while not first.future.done() and any(job.taken() for job in held):
        pass
    held.popleft()
    return first.future.result()


def check_workers(workers: int | None) -> int:
    """How many threads: one for each core, unless told."""
    if workers is not None and workers < 1:
        raise SettingError(
            f"workers={workers}, but it is a number of threads: 1 or more. Leave it out for all cores"
        )
    return workers or os.cpu_count() or 1
