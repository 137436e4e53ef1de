"""One worker thread, and a bounded queue before it.

Knows: threads, deadlines. Does not know about models, contexts or HTTP.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kveraser.errors import JobCancelledError, JobTimeoutError, QueueFullError


class Job:
    """One piece of work; `future` is its result.

    Args:
        work: called in the worker's thread with this job; calls `check()` every now and then.
        timeout: seconds from now.
    """

    def __init__(self, work: Callable[[Job], Any], timeout: float) -> None:
        self.work, self.timeout = work, timeout
        self.future: Future[Any] = Future()
        self._deadline = time.monotonic() + timeout
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have the work stop at its next `check()`, or never start."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `JobCancelledError` or `JobTimeoutError` when the work should stop."""
        if self._cancelled.is_set():
            raise JobCancelledError("the request was cancelled")
        if time.monotonic() > self._deadline:
            raise JobTimeoutError(f"the request took longer than {self.timeout:g} s, waiting included")


class Worker:
    """Runs jobs one after another in one thread, and idle work when there are none.

    Args:
        capacity: jobs that may wait.
        idle: does a little work; returns whether there is more.
        after: called in the worker's thread after every job and every bit of idle work, before the result is there.
    """

    def __init__(self, capacity: int, idle: Callable[[], bool], after: Callable[[], None] = lambda: None) -> None:
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._capacity, self._idle, self._after = capacity, idle, after
        self._typical = 1.0  # seconds per job, a running mean
        self._stopping = threading.Event()
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._run, name="kveraser-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._queue.qsize()

    def submit(self, work: Callable[[Job], Any], timeout: float) -> Job:
        """Put work into the queue.

        Raises:
            QueueFullError: it is full.
            JobCancelledError: the worker is stopping.
        """
        if self._stopping.is_set():
            raise JobCancelledError("the server is stopping")
        if self.waiting >= self._capacity:
            raise QueueFullError(self.waiting, max(1, math.ceil(self.waiting * self._typical)))
        job = Job(work, timeout)
        self._queue.put(job)
        return job

    def stop(self, grace: float) -> None:
        """Take no more jobs; finish those there are, for `grace` seconds, then cancel the others; end the thread."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(grace)
        if self._thread.is_alive():
            while (running := self._running) is not None or not self._queue.empty():
                if running is not None:
                    running.cancel()
                for job in list(self._queue.queue):
                    if job is not None:
                        job.cancel()
                self._thread.join(0.05)
                if not self._thread.is_alive():
                    return
            self._thread.join()

    def _run(self) -> None:
        more = True
        while True:
            try:
                job = self._queue.get(block=not more)
            except queue.Empty:
                more = False if self._stopping.is_set() else self._idle()
                self._after()
                continue
            if job is None:
                return
            if not job.future.set_running_or_notify_cancel():
                continue
            self._running, started = job, time.monotonic()
            try:
                job.check()
                result, error = job.work(job), None
            except BaseException as raised:
                result, error = None, raised
            self._after()
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            self._typical += 0.2 * (time.monotonic() - started - self._typical)
            self._running, more = None, True
