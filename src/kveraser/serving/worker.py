"""One worker thread, and a bounded queue before it.

Knows: threads, deadlines, turns. Does not know about models, contexts or HTTP.

Most work is done whole, one piece after the other. Work that takes turns is a generator: several of them are open at a time, and
other work is done between their turns. One yields `None` to let others have a turn, or a wish; all wishes that there are by then are
granted together, and each generator is sent what became of its own (an exception is thrown into it).

    a round:   a piece of work from the queue, whole, and a turn of the oldest that has no wish, | all wishes
               and more of both for as long as the last wishes took

What cannot go on before other work has ended says so with an error, and is begun anew then. Where it is memory that is missing, all waits
behind it, that there will be some; where it is work of its own group that is in its way, only later work of that group does.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import insort
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from kveraser.errors import JobCancelledError, JobTimeoutError, NotYetError, OwnerBusyError, QueueFullError

log = logging.getLogger("kveraser.serving")

T = TypeVar("T")
_STOPPING = "the server is stopping"
Turns = Generator[Any, Any, T]
"""Work that takes turns with other work."""
Work = Callable[["Job"], T | Turns[T]]


class Job:
    """One piece of work; `future` is its result.

    Args:
        work: called in the worker's thread with this job; calls `check()` every now and then.
        timeout: seconds from now.
        number: its place in the order in which work came.
        group: of whom it is, as far as work waits for other work; anything that can be compared.

    Attributes:
        alone: whether it waits until nothing else of its group is open.
        turns: the work as it goes on, where it takes turns.
        wish: what it waits for, or None.
    """

    def __init__(self, work: Work[Any], timeout: float, number: int = 0, group: Hashable = None) -> None:
        self.work, self.timeout, self.number, self.group = work, timeout, number, group
        self.alone = False
        self.turns: Turns[Any] | None = None
        self.wish: Any = None
        self.started = 0.0
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

    def put_back(self) -> None:
        """It waits again, and will be begun anew."""
        self.turns, self._begun = None, False

    def give_up(self) -> None:
        """If it still waits and should stop, it fails now, without its turn."""
        error = self._why_stop()
        if error is not None and self.begin():
            self.future.set_exception(error)


class Worker:
    """Runs jobs in one thread, and idle work when there are none.

    Args:
        capacity: jobs that may wait.
        idle: does a little work; returns whether there is more.
        after: called in the worker's thread after every job and every bit of idle work, before the result is there.
        together: grants the wishes of jobs that take turns; gives a result or an exception for each.
        most: so many of these are open at a time.
    """

    def __init__(
        self,
        capacity: int,
        idle: Callable[[], bool],
        after: Callable[[], None] = lambda: None,
        together: Callable[[Sequence[Any]], Sequence[Any]] = list,
        most: int = 1,
    ) -> None:
        self._queue: list[Job] = []  # in the order of their numbers
        self._count = 0
        self._changed = threading.Condition()
        self._capacity, self._idle, self._after = capacity, idle, after
        self._together, self._most = together, most
        self._typical = 1.0  # seconds from the end of one job to that of the next, a running mean
        self._stopping = False
        self._running: Job | None = None
        self._open: list[Job] = []  # replaced, not changed: other threads look at it
        self._granting = 0.0  # seconds that the last wishes took
        self._full = False  # a job waits for what only the end of another one sets free
        self._thread = threading.Thread(target=self._run, name="kveraser-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn; not those that nobody waits for any more."""
        with self._changed:
            return self._clear()

    @property
    def taking_turns(self) -> int:
        """Jobs that are open at the same time."""
        return len(self._open)

    def submit(self, work: Work[Any], timeout: float, group: Hashable = None) -> Job:
        """Put work into the queue.

        Args:
            group: of whom it is: what has to wait for work of its own group holds back later work of that group, nobody else's.

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
            self._count += 1
            job = Job(work, timeout, self._count, group)
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
                jobs = [*self._queue, *self._open, *([self._running] if self._running else [])]
            for job in jobs:
                job.cancel(_STOPPING)
            self._thread.join(0.05)

    def _clear(self) -> int:
        """Drop what was given up; how many wait. Called with the lock held."""
        for job in self._queue:
            job.give_up()
        self._queue = [job for job in self._queue if job.waits]
        return len(self._queue)

    def _next(self, wait: bool) -> Job | None:
        """The next job, if there is one that can be taken up (or once there is one); None when there is none, or no more."""
        with self._changed:
            while True:
                self._clear()
                for job in list(self._ready()):
                    if job.begin():
                        self._queue.remove(job)
                        self._running = job
                        return job
                if not wait or self._stopping:
                    return None
                self._changed.wait()

    def _ready(self) -> Iterator[Job]:
        """The jobs that can be taken up, in their order.

        One that takes turns is not while as many as there may be are open, nor one that waits for others of its group, and what is of
        this group behind it; all else is.
        """
        if self._full:
            return
        no_place = len(self._open) >= self._most
        busy, held_back = {job.group for job in self._open}, set[Hashable]()
        for job in self._queue:
            if job.alone and job.group in busy:
                held_back.add(job.group)
            elif job.group not in held_back and not (no_place and job.turns is not None):
                yield job

    def _put_back(self, job: Job) -> None:
        with self._changed:
            insort(self._queue, job, key=lambda other: other.number)

    def _run(self) -> None:
        more = True
        while True:
            done = self._do_apart(wait=not (more or self._open))
            if self._open:
                self._grant()
            elif not done:
                if self._stopping:
                    return
                more = bool(self._survive(self._idle))
                self._survive(self._after)
                continue
            more = True

    def _begin(self, job: Job) -> None:
        """Do a piece of work, or open one that takes turns."""
        job.started = job.started or time.monotonic()
        result, error = None, None
        try:
            result = job.turns or job.work(job)
        except BaseException as raised:
            error = raised
        if isinstance(result, Generator):
            if len(self._open) < self._most:
                job.turns, self._open = result, [*self._open, job]
            else:
                job.put_back()
                job.turns = result
                self._put_back(job)
            self._running = None
        else:
            self._end(job, result, error)

    def _do_apart(self, wait: bool) -> bool:
        """Do what is not done together; whether there was anything.

        It gets as much time as the wishes: a long piece of work does not keep others from theirs, nor do many short ones.
        """
        until, done = time.monotonic() + self._granting, False
        while not done or time.monotonic() < until:
            new = self._next(wait and not done)
            if new is not None:
                self._begin(new)
            old = next((job for job in self._open if job.wish is None), None)
            if old is not None:
                self._turn(old, None)
            if new is None and old is None:
                break
            done = True
        return done

    def _grant(self) -> None:
        """Grant all wishes."""
        started = time.monotonic()
        wishing = [job for job in self._open if job.wish is not None]
        if wishing:
            for job, granted in zip(wishing, self._together([job.wish for job in wishing]), strict=True):
                self._turn(job, granted)
        self._granting = time.monotonic() - started

    def _turn(self, job: Job, sent: Any) -> None:
        """Let a job go on until it yields, or ends."""
        assert job.turns is not None
        result, error = None, None
        try:
            job.wish = job.turns.throw(sent) if isinstance(sent, BaseException) else job.turns.send(sent)
            return
        except StopIteration as end:
            result = end.value
        except BaseException as raised:
            error = raised
        self._end(job, result, error)

    def _end(self, job: Job, result: Any, error: BaseException | None) -> None:
        """What became of a job; one whose time has not come yet waits again, until others have ended."""
        together = len(self._open)
        self._open = [other for other in self._open if other is not job]
        alone = isinstance(error, OwnerBusyError)
        if isinstance(error, NotYetError) and any(not alone or other.group == job.group for other in self._open):
            job.alone, self._full = alone, not alone
            job.put_back()
            self._put_back(job)
        else:
            self._full = False
            self._survive(self._after)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            taken = (time.monotonic() - job.started) / max(together, 1)
            self._typical += 0.2 * (taken - self._typical)
        self._running = None

    @staticmethod
    def _survive(call: Callable[[], T]) -> T | None:
        """What a call gives; None where it fails: the thread has jobs to do all the same."""
        try:
            return call()
        except Exception as error:
            log.error("unexpected %s between jobs", type(error).__name__)
            return None
