"""Read-ahead over an iterable: what comes next is read by threads while the caller works on what came before."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """`read(item)` of each item, in their order, by threads; an error of one is raised where its turn comes. Items are
    taken one by one in the caller's thread; `ahead` of them (by default one a thread) are in work, or wait, while one
    is in the caller's hands. Close the generator, or run it to its end, and no thread is left."""
    ahead = threads if ahead is None else ahead
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
