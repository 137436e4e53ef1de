"""One worker thread, and a bounded queue before it.

Knows: threads, deadlines. Does not know about models, contexts or HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from kveraser.errors import JobCancelledError, JobTimeoutError, QueueFullError

log = logging.getLogger("kveraser.serving")

T = TypeVar("T")
_STOPPING = "the server is stopping"


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
        self._cancelled, self._begun, self._lock = "", False, threading.Lock()

    @property
    def waits(self) -> bool:
        """Whether it is still to be begun."""
        return not self._begun

    def cancel(self, why: str = "the request was cancelled") -> None:
        """Have the work stop at its next `check()`; if it has not begun, it never does."""
        self._cancelled = self._cancelled or why
        self.give_up()

    def check(self) -> None:
        """Raise `JobCancelledError` or `JobTimeoutError` when the work should stop."""
        if (error := self._why_stop()) is not None:
            raise error

    def _why_stop(self) -> JobCancelledError | JobTimeoutError | None:
        if self._cancelled:
            return JobCancelledError(self._cancelled)
        if time.monotonic() > self._deadline:
            return JobTimeoutError(f"the request took longer than {self.timeout:g} s, waiting included")
        return None

    def begin(self) -> bool:
        """Take it up; False when it was begun or given up before."""
        with self._lock:
            begun, self._begun = self._begun, True
            return not begun

    def give_up(self) -> None:
        """If it still waits and should stop, it fails now, without its turn."""
        error = self._why_stop()
        if error is not None and self.begin():
            self.future.set_exception(error)


class Worker:
    """Runs jobs one after another in one thread, and idle work when there are none.

    Args:
        capacity: jobs that may wait.
        idle: does a little work; returns whether there is more.
        after: called in the worker's thread after every job and every bit of idle work, before the result is there.
    """

    def __init__(self, capacity: int, idle: Callable[[], bool], after: Callable[[], None] = lambda: None) -> None:
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._capacity, self._idle, self._after = capacity, idle, after
        self._typical = 1.0  # seconds per job, a running mean
        self._stopping = False
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._run, name="kveraser-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn; not those that nobody waits for any more."""
        with self._changed:
            return self._clear()

    def submit(self, work: Callable[[Job], Any], timeout: float) -> Job:
        """Put work into the queue.

        Raises:
            QueueFullError: it is full.
            JobCancelledError: the worker is stopping.
        """
        with self._changed:
            if self._stopping:
                raise JobCancelledError(_STOPPING)
            waiting = self._clear()
            if waiting >= self._capacity:
                raise QueueFullError(waiting, max(1, math.ceil(waiting * self._typical)))
            job = Job(work, timeout)
            self._queue.append(job)
            self._changed.notify()
            return job

    def stop(self, grace: float) -> None:
        """Take no more jobs; finish those there are, for `grace` seconds, then cancel the others; end the thread."""
        self.stop_soon(grace)
        self._thread.join()

    def stop_soon(self, grace: float) -> None:
        """The same without waiting for it. Said a second time, it changes nothing."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify()
        threading.Thread(target=self._cancel_after, args=(grace,), name="kveraser-stopping", daemon=True).start()

    def _cancel_after(self, grace: float) -> None:
        self._thread.join(grace)
        while self._thread.is_alive():
            with self._changed:
                jobs = [*self._queue, *([self._running] if self._running else [])]
            for job in jobs:
                job.cancel(_STOPPING)
            self._thread.join(0.05)

    def _clear(self) -> int:
        """Drop what was given up; how many wait. Called with the lock held."""
        for job in self._queue:
            job.give_up()
        self._queue = deque(job for job in self._queue if job.waits)
        return len(self._queue)

    def _next(self, wait: bool) -> Job | None:
        """The next job, if there is one (or once there is one); None when there is none, or no more."""
        with self._changed:
            while True:
                while self._queue:
                    job = self._queue.popleft()
                    job.give_up()
                    if job.begin():
                        self._running = job
                        return job
                if not wait or self._stopping:
                    return None
                self._changed.wait()

    def _run(self) -> None:
        more = True
        while True:
            job = self._next(wait=not more)
            if job is None:
                if self._stopping:
                    return
                more = bool(self._survive(self._idle))
                self._survive(self._after)
                continue
            started = time.monotonic()
            try:
                result, error = job.work(job), None
            except BaseException as raised:
                result, error = None, raised
            self._survive(self._after)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            self._typical += 0.2 * (time.monotonic() - started - self._typical)
            self._running, more = None, True

    @staticmethod
    def _survive(call: Callable[[], T]) -> T | None:
        """What a call gives; None where it fails: the thread has jobs to do all the same."""
        try:
            return call()
        except Exception as error:
            log.error("unexpected %s between jobs", type(error).__name__)
            return None
