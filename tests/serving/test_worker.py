"""The queue before the worker, and what it does when there is nothing to do."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from kveraser.errors import JobCancelledError, JobTimeoutError, NotYetError, OwnerBusyError, QueueFullError
from kveraser.serving.worker import Worker


def test_a_full_queue_says_when_to_come_back_and_a_late_job_never_runs():
    worker = Worker(2, lambda: False)
    gate = threading.Event()
    running = worker.submit(lambda job: gate.wait(5), 5)
    while worker.waiting:
        time.sleep(0.001)
    late = worker.submit(lambda job: "never", 0.2)
    gone = worker.submit(lambda job: "never", 5)
    with pytest.raises(QueueFullError) as caught:
        worker.submit(lambda job: None, 5)
    assert caught.value.retry_after >= 1
    gone.cancel()
    time.sleep(0.21)
    gate.set()
    assert running.future.result(5) is True
    with pytest.raises(JobTimeoutError):
        late.future.result(5)
    with pytest.raises(JobCancelledError):
        gone.future.result(5)
    worker.stop(1)
    with pytest.raises(JobCancelledError, match="stopping"):
        worker.submit(lambda job: None, 5)


def test_what_nobody_waits_for_any_more_fails_at_once_and_takes_no_place_in_the_queue():
    worker = Worker(2, lambda: False)
    gate = threading.Event()
    worker.submit(lambda job: gate.wait(5), 5)
    while worker.waiting:
        time.sleep(0.001)
    gone, late = worker.submit(lambda job: "never", 5), worker.submit(lambda job: "never", 0.01)
    gone.cancel()
    with pytest.raises(JobCancelledError):
        gone.future.result(0)
    time.sleep(0.02)
    assert worker.waiting == 0
    with pytest.raises(JobTimeoutError):
        late.future.result(0)
    more = [worker.submit(lambda job: "done", 5) for _ in range(2)]
    gate.set()
    assert [job.future.result(5) for job in more] == ["done", "done"]
    worker.stop(1)


def test_a_job_that_fails_is_reported_and_the_next_one_runs():
    worker = Worker(4, lambda: False)
    failed = worker.submit(lambda job: 1 / 0, 5)
    assert worker.submit(lambda job: 42, 5).future.result(5) == 42
    with pytest.raises(ZeroDivisionError):
        failed.future.result(5)
    worker.stop(1)


def test_stopping_cancels_what_does_not_end_by_itself():
    worker = Worker(4, lambda: False)

    def endless(job):
        while True:
            job.check()
            time.sleep(0.001)

    job = worker.submit(endless, 60)
    worker.stop(0.05)
    with pytest.raises(JobCancelledError):
        job.future.result(1)


def test_idle_work_is_done_between_jobs_only():
    steps = []
    worker = Worker(4, lambda: steps.append(1) or len(steps) < 5)
    worker.submit(lambda job: None, 5).future.result(5)
    deadline = time.monotonic() + 5
    while len(steps) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    worker.stop(1)
    assert len(steps) >= 5


def test_what_fails_between_jobs_does_not_end_the_thread(caplog):
    worker = Worker(4, lambda: 1 / 0, lambda: [].pop())
    for _ in range(3):
        assert worker.submit(lambda job: 42, 5).future.result(5) == 42
    worker.stop(1)
    assert "ZeroDivisionError" in caplog.text
    assert "IndexError" in caplog.text


def test_work_that_takes_turns_has_its_wishes_granted_together_while_other_work_is_done_between():
    told, done = [], []

    def together(wishes):
        told.append(wishes)
        return [10 * wish for wish in wishes]

    def turns(number, count):
        done.append(f"begun {number}")
        yield None
        found = []
        for step in range(count):
            found.append((yield number + step))
        return found

    worker = Worker(9, lambda: False, together=together, most=2)
    gate = threading.Event()
    worker.submit(lambda job: gate.wait(5), 5)
    jobs = [worker.submit(lambda job, n=n: turns(n, 6), 5) for n in (100, 200, 300)]
    between = worker.submit(lambda job: done.append("between"), 5)
    gate.set()
    assert [job.future.result(5) for job in jobs] == [[10 * (n + step) for step in range(6)] for n in (100, 200, 300)]
    between.future.result(5)
    assert max(map(len, told)) == 2  # never more than there may be
    assert done.index("between") < done.index("begun 300")  # what takes turns waits for a place, other work does not
    worker.stop(1)


def noted(order, name, gate=None):
    """Work that takes turns, and notes its name when it is begun; it ends soon after, or once the gate is open."""

    def work(job):
        order.append(name)
        for step in count():
            job.check()
            if step > 3 and (gate is None or gate.is_set()):
                return name
            yield "step"

    return work


def wait_for(what):
    deadline = time.monotonic() + 5
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_waits_for_a_place_is_begun_first_come_first_served_whoever_comes_meanwhile():
    worker = Worker(9, lambda: False, most=2)
    order, gate = [], threading.Event()
    jobs = [worker.submit(noted(order, name, gate), 5) for name in ("first", "second")]
    wait_for(lambda: len(order) == 2)
    for name in "ABCDE":
        jobs.append(worker.submit(noted(order, name), 5))
        assert worker.submit(lambda job: "whole", 5).future.result(5) == "whole"  # the worker has seen what came before
    gate.set()
    for job in jobs:
        job.future.result(5)
    assert order == ["first", "second", *"ABCDE"]
    worker.stop(1)


def test_what_takes_turns_hears_of_its_own_error_alone_and_can_be_cancelled_between_turns():
    def together(wishes):
        return [ZeroDivisionError() if wish == "bad" else wish for wish in wishes]

    worker = Worker(9, lambda: False, together=together, most=3)

    def turns(job, wish):
        for _ in range(50):
            job.check()
            yield wish
        return "done"

    def until_cancelled(job):
        while True:
            job.check()
            yield "endless"

    gate = threading.Event()
    worker.submit(lambda job: gate.wait(5), 5)
    bad, good = (worker.submit(lambda job, w=w: turns(job, w), 5) for w in ("bad", "good"))
    endless = worker.submit(until_cancelled, 5)
    gate.set()
    with pytest.raises(ZeroDivisionError):
        bad.future.result(5)
    assert good.future.result(5) == "done"
    endless.cancel()
    with pytest.raises(JobCancelledError):
        endless.future.result(5)
    stopped = worker.submit(until_cancelled, 60)
    worker.stop(0.05)
    with pytest.raises(JobCancelledError):
        stopped.future.result(1)
    assert worker.taking_turns == 0


def test_what_has_no_room_yet_waits_until_another_one_has_ended_and_is_told_so_only_if_there_is_none():
    worker = Worker(9, lambda: False, together=list, most=3)
    held, tries = [], []

    def holder(job):
        held.append(1)
        for _ in range(5):
            yield "step"
        held.clear()

    def wanting(job):
        tries.append(1)
        if held:
            raise NotYetError("later")
        return "room"

    gate = threading.Event()
    worker.submit(lambda job: gate.wait(5), 5)
    first, second = worker.submit(holder, 5), worker.submit(wanting, 5)
    gate.set()
    assert second.future.result(5) == "room"
    assert first.future.done()
    assert len(tries) == 2
    held.append(1)
    with pytest.raises(NotYetError):
        worker.submit(wanting, 5).future.result(5)
    worker.stop(1)


def test_what_has_no_room_yet_keeps_its_place_before_what_came_later():
    worker = Worker(9, lambda: False, most=2)
    order, gate, held = [], threading.Event(), [1]

    def wanting(job):
        if held:
            raise NotYetError("later")
        order.append("wanting")
        yield "step"

    def holder(job):
        yield from noted(order, "holder", gate)(job)
        held.clear()

    jobs = [worker.submit(holder, 5)]
    wait_for(lambda: order == ["holder"])
    jobs += [worker.submit(wanting, 5), *(worker.submit(noted(order, name), 5) for name in "AB")]
    wait_for(lambda: worker.waiting == 3)
    gate.set()
    for job in jobs:
        job.future.result(5)
    assert order == ["holder", "wanting", *"AB"]
    worker.stop(1)


def test_what_waits_for_its_own_group_holds_back_what_comes_later_of_that_group_and_nobody_else():
    worker = Worker(9, lambda: False, most=3)
    order, gate, busy = [], threading.Event(), set()

    def making(name, gate=None):
        def work(job):
            busy.add(name)
            yield from noted(order, name, gate)(job)
            busy.remove(name)

        return work

    def alone(job):
        if any(name.startswith("a") for name in busy):
            raise OwnerBusyError("later")
        order.append("alone")
        return "alone"
        yield

    jobs = [worker.submit(making("a1", gate), 5, "a")]
    wait_for(lambda: order == ["a1"])
    jobs += [worker.submit(alone, 5, "a"), worker.submit(making("a2"), 5, "a")]
    for name in ("b1", "b2"):
        worker.submit(making(name), 5, "b").future.result(5)
    worker.submit(making("c1"), 5).future.result(5)
    assert not jobs[0].future.done()
    gate.set()
    for job in jobs:
        job.future.result(5)
    assert order == ["a1", "b1", "b2", "c1", "alone", "a2"]
    busy.add("a of nobody")
    with pytest.raises(OwnerBusyError):
        worker.submit(alone, 5, "a").future.result(5)
    worker.stop(1)
