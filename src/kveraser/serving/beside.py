"""Work that needs no context, such as tokenising, beside the event loop and beside the worker.

Knows: threads, asyncio. Does not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kveraser.errors import QueueFullError

T = TypeVar("T")
_THREADS = 2


class Beside:
    """A few threads for short work.

    Args:
        capacity: pieces of work that may be there at once, running or waiting.
    """

    def __init__(self, capacity: int) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kveraser-beside")
        self._capacity, self._count = capacity + _THREADS, 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of some work; the event loop goes on meanwhile. To be called from the event loop's thread.

        Raises:
            QueueFullError: too much is waiting.
            whatever the work raises.
        """
        if self._count >= self._capacity:
            raise QueueFullError(self._count, 1)
        self._count += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._done)  # also where nobody waits any more
        return await asyncio.shield(future)

    def _done(self, future: asyncio.Future[T]) -> None:
        self._count -= 1
        if not future.cancelled():
            future.exception()  # else asyncio logs it, text and all

    def stop(self) -> None:
        """Take no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
