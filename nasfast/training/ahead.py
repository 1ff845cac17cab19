"""Work that is done ahead of the loop that uses it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """``map(work, items)`` whose next results are made meanwhile by so many threads; 0: by none.

    Results come in order, and an error is raised where its result would come. ``work`` must not
    depend on what it did for other items.
    """
    if threads == 0:
        yield from map(work, items)
        return
    pool, waiting = ThreadPoolExecutor(threads, "ahead"), deque[Future[B]]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
