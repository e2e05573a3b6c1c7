"""Reading hidden behind training: while a step is trained on, a thread reads the rows of the next one.

    read(0) | read(1)        | read(2)        |
            | train on 0     | train on 1     | train on 2

What a step reads is a function of its number alone, so nothing depends on when it is read. Only reading happens in the thread, no collective and nothing on the
device: those of two threads would get into each other's way. Costs the rows of one more step in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Rows = TypeVar("Rows")


@contextmanager
def read_ahead(read: Callable[[int], Rows], steps: int) -> Iterator[Callable[[int], Rows]]:
    """`read`, for steps that are asked for in turn: each call begins the next one, if it is below `steps`. What reading a step raises is raised when that step
    is asked for, and never if it is not. On the way out a read that is under way is waited for.
    """
    coming: dict[int, Future[Rows]] = {}
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:

        def rows(step: int) -> Rows:
            found = (coming.pop(step) if step in coming else thread.submit(read, step)).result()
            if step + 1 < steps:
                coming[step + 1] = thread.submit(read, step + 1)
            return found

        try:
            yield rows
        finally:
            for future in coming.values():
                future.cancel()
