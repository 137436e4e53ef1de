"""Work in threads beside the event loop: what needs no context, such as tokenising, and waiting for other servers.

Knows: threads, asyncio. Does not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kveraser.errors import QueueFullError

T = TypeVar("T")


class Beside:
    """A few threads; `run` is for the event loop, the executor `threads` for everybody else.

    Args:
        capacity: pieces of work that may wait; None for any number.
        threads: how many work at the same time.
    """

    def __init__(self, capacity: int | None, threads: int = 2, name: str = "kveraser-beside") -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._capacity = None if capacity is None else capacity + threads
        self._count = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of some work; the event loop goes on meanwhile. To be called from the event loop's thread.

        Raises:
            QueueFullError: too much is waiting.
            whatever the work raises.
        """
        if self._capacity is not None and self._count >= self._capacity:
            raise QueueFullError(self._count, 1)
        self._count += 1
        future = asyncio.get_running_loop().run_in_executor(self.threads, work)
        future.add_done_callback(self._done)  # also where nobody waits any more
        return await asyncio.shield(future)

    def _done(self, future: asyncio.Future[T]) -> None:
        self._count -= 1
        if not future.cancelled():
            future.exception()  # else asyncio logs it, text and all

    def stop(self) -> None:
        """Take no more work."""
        self.threads.shutdown(wait=False, cancel_futures=True)
