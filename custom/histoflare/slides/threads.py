"""The same work on many things, on a thread for each core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 2
"""Items started ahead for each thread: no thread waits, and stopping early waits for few."""

Thing = TypeVar("Thing")
Made = TypeVar("Made")


def make_each(make: Callable[[Thing], Made], things: Iterable[Thing]) -> Generator[Made, None, None]:
    """Yield ``make(thing)`` for each of ``things``, in their order.

    NumPy, Pillow and PyTorch let go of the interpreter for most of their work. An error of one thing is
    raised in its turn.
    """
    threads, rest = len(os.sched_getaffinity(0)), iter(things)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="make")
    begun: deque[Future[Made]] = deque()
    try:
        begun.extend(pool.submit(make, thing) for thing in islice(rest, AHEAD * threads))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(make, thing) for thing in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)
