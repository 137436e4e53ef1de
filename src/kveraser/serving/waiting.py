"""From a request to the worker's thread and back: awaiting, streaming, and stopping when nobody waits any more.

Knows: asyncio, jobs. Does not know what the work is, or how its result is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from fastapi import Request

from kveraser.errors import JobCancelledError
from kveraser.serving.service import Service
from kveraser.serving.worker import Job, Work

T = TypeVar("T")
_LOOK_EVERY = 0.2  # seconds between looks whether the client is still there
_SOON = 0.01  # seconds behind a deadline, when it is certainly over


def _submit(service: Service, work: Work[Any], owner: str | None) -> Job:
    """Queue work; if its time is over before its turn comes, it fails then and not when its turn comes."""
    job = service.submit(work, owner)
    asyncio.get_running_loop().call_later(job.timeout + _SOON, job.give_up)
    return job


async def run(service: Service, request: Request, work: Work[T], owner: str | None = None) -> T:
    """The result of work in the worker's thread; the work is cancelled when the client goes away.

    Args:
        owner: whose conversations it is about; None for other work.
    """
    job = _submit(service, work, owner)
    future = asyncio.wrap_future(job.future)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it, text and all
    try:
        while not (await asyncio.wait({future}, timeout=_LOOK_EVERY))[0]:
            if await request.is_disconnected():
                job.cancel()
        result: T = future.result()
        return result
    except BaseException:
        job.cancel()
        raise


async def first_of(request: Request, events: AsyncGenerator[T]) -> T:
    """The first of some events; if the client goes away before it, the events are closed.

    Raises:
        JobCancelledError: the client has gone.
        whatever the events raise.
    """
    first = asyncio.ensure_future(anext(events))
    while not (await asyncio.wait({first}, timeout=_LOOK_EVERY))[0]:
        if await request.is_disconnected():
            first.cancel()
            await asyncio.wait({first})
            raise JobCancelledError("the request was cancelled")
    return first.result()


async def with_first(first: T, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The events with the first of them, which `first_of` has taken."""
    yield first
    async for event in events:
        yield event


async def stream(
    service: Service, work: Callable[[Job, Callable[[T], None]], Any], owner: str | None = None
) -> AsyncGenerator[T]:
    """What work in the worker's thread emits; closing the iterator cancels the work.

    Args:
        owner: whose conversations it is about; None for other work.

    Raises:
        whatever the work raises.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[T | None] = asyncio.Queue()

    def emit(event: T | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = _submit(service, lambda job: work(job, emit), owner)
    job.future.add_done_callback(lambda _: None if loop.is_closed() else emit(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        await asyncio.wrap_future(job.future)
    finally:
        job.cancel()
