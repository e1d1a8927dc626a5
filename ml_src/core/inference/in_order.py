"""Work of other threads, in the order in which it was given. Next to read: `predictor.py`, which uses it."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

log = logging.getLogger("ml_src")
Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    function: Callable[[Given], Made], things: Iterable[Given], ahead: int, threads: int = 1
) -> Iterator[tuple[Given, Made]]:
    """Yield each thing with what the function makes of it, in order; `ahead` of them are taken in advance.

    What the function raises is raised here, when that thing's turn comes.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[Given, Future[Made]]] = deque()
    try:
        for thing in things:
            pending.append((thing, pool.submit(function, thing)))
            del thing
            if len(pending) > ahead:
                given, future = pending.popleft()
                yield given, future.result()
                del given, future
        while pending:
            given, future = pending.popleft()
            yield given, future.result()
    except KeyboardInterrupt:
        log.info("Stopping when what is in work is finished ...")
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
