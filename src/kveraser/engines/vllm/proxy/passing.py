"""From one server to the next until one answers, and replies as they come.

Knows: attempts, HTTP responses, when a reply has begun. Does not know what the attempts are for.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kveraser.engines.vllm.proxy.replicas import Replica, Replicas
from kveraser.engines.vllm.proxy.replies import Events, Told, begins
from kveraser.errors import ApiError
from kveraser.serving.events import EVENT_STREAM, event_line

log = logging.getLogger("kveraser")

_FAILURES = (500, 502, 503, 504)
_MOST_FAILURES = 2
"""Servers that may fail on one request before it is given up: it may be the request that makes them fail."""
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
               "upgrade"}  # fmt: skip
_OURS = {*_HOP_BY_HOP, "host", "content-length", "authorization", "x-api-key", "expect"}
"""Of a request, not passed on: keys are let in here, the servers have one of their own."""
_CUT = {"error": {"message": "the server that was answering has failed", "type": "server_error", "param": None,
                  "code": "upstream_failed"}}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """A way to have a request answered.

    Attributes:
        told: where it is answered from an edited context; whatever goes wrong then, the next way is tried.
    """

    replica: Replica
    content: bytes
    told: Told | None = None


@dataclass(eq=False)
class Opened:
    """A reply that has begun.

    Attributes:
        head: what has been read of its body.
        whole: whether that is all of it.
    """

    attempt: Attempt
    response: httpx.Response
    head: bytes
    whole: bool
    rest: AsyncIterator[bytes]
    closed: bool = False

    @property
    def is_reply(self) -> bool:
        """Whether it is what was asked for, and no error."""
        return self.response.status_code == 200

    async def close(self) -> None:
        """The server need not go on with it."""
        if not self.closed:
            self.closed = True
            self.attempt.replica.in_flight -= 1
            with suppress(httpx.HTTPError):
                await self.response.aclose()


class _Failed(Exception):
    """An attempt has failed; `sent`: the server may have begun to work on it."""

    def __init__(self, reason: str, *, sent: bool, opened: Opened | None = None) -> None:
        super().__init__(reason)
        self.sent, self.opened = sent, opened


def passed_headers(headers: Mapping[str, str], *, edited: bool) -> dict[str, str]:
    """The headers of a request that are passed on."""
    named = headers.get("connection", "").lower().replace(" ", "").split(",")
    kept = {name: value for name, value in headers.items() if name.lower() not in _OURS and name.lower() not in named}
    return {**kept, "accept-encoding": "identity"} if edited else kept


async def open_first(
    replicas: Replicas, attempts: Sequence[Attempt], method: str, path: str, headers: Mapping[str, str],
    failed: Callable[[Attempt], None],
) -> Opened:  # fmt: skip
    """The first reply that begins. What a server answers after it has failed is passed on when no other one is left.

    Args:
        failed: called with every attempt that failed.

    Raises:
        ApiError: 503, no server can be reached.
    """
    last: Opened | None = None
    failures = 0
    try:
        for attempt in attempts:
            if failures == _MOST_FAILURES:
                break
            try:
                opened = await _open(
                    replicas, attempt, method, path, passed_headers(headers, edited=bool(attempt.told))
                )
            except _Failed as error:
                failed(attempt)
                log.warning("server %d: %s", attempt.replica.number, error)
                if attempt.told is None:
                    failures += error.sent
                    attempt.replica.failed()
                    if error.opened is not None:
                        await _replace(last)
                        last = error.opened
                elif error.opened is not None:
                    await error.opened.close()
                if attempt.told and not error.sent:
                    attempt.replica.failed()
                continue
            await _replace(last)
            return opened
    except BaseException:
        await _replace(last)
        raise
    if last is not None:
        return last
    raise ApiError(503, "none of the vLLM servers can be reached", code="no_upstream")


async def _replace(last: Opened | None) -> None:
    if last is not None:
        await last.close()


async def _open(replicas: Replicas, attempt: Attempt, method: str, path: str, headers: Mapping[str, str]) -> Opened:
    replica = attempt.replica
    replica.in_flight += 1
    opened: Opened | None = None
    try:
        response = await replicas.send(replica, method, path, headers, attempt.content)
        opened = Opened(attempt, response, b"", False, response.aiter_raw())
        kind = await _read_beginning(opened)
    except httpx.HTTPError as error:
        await _give_back(opened, replica)
        raise _Failed(f"no reply ({type(error).__name__})", sent=not isinstance(error, _UNSENT)) from error
    except BaseException:
        await _give_back(opened, replica)
        raise
    status = response.status_code
    if kind == "failure" or status in _FAILURES or (attempt.told and (kind == "error" or status != 200)):
        raise _Failed(f"status {status}, {kind}", sent=True, opened=opened)
    return opened


async def _give_back(opened: Opened | None, replica: Replica) -> None:
    if opened is None:
        replica.in_flight -= 1
    else:
        await opened.close()


async def _read_beginning(opened: Opened) -> str:
    """Read until it is known whether the reply has begun; in what way."""
    if not opened.response.headers.get("content-type", "").startswith(EVENT_STREAM):
        opened.head, opened.whole = b"".join([data async for data in opened.rest]), True
        return "reply"
    events = Events()
    async for data in opened.rest:
        opened.head += data
        for event in events.push(data):
            kind = begins(event)
            if kind != "nothing":
                return kind
    opened.whole = True
    return "reply"


class Passed(StreamingResponse):
    """A reply on its way to the client. `done` is called when it is over, however it ends."""

    def __init__(self, opened: Opened, done: Callable[[], None]) -> None:
        self.opened, self.done = opened, done
        told = opened.attempt.told
        dropped = {*_HOP_BY_HOP, "date", "server", *(["content-length"] if told or not opened.whole else [])}
        headers = {name: value for name, value in opened.response.headers.items() if name not in dropped}
        headers["x-kveraser-replica"] = str(opened.attempt.replica.number)
        body = _told(opened, told) if told else _as_it_came(opened)
        super().__init__(body, opened.response.status_code, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()
            await self.opened.close()


async def _as_it_came(opened: Opened) -> AsyncIterator[bytes]:
    yield opened.head
    if opened.whole:
        return
    try:
        async for data in opened.rest:
            yield data
    except httpx.HTTPError:
        yield _cut(opened)


async def _told(opened: Opened, told: Told) -> AsyncIterator[bytes]:
    if not opened.response.headers.get("content-type", "").startswith(EVENT_STREAM):
        yield told.whole(opened.head)
        return
    events = Events()
    yield b"".join(map(told.event, events.push(opened.head)))
    try:
        if not opened.whole:
            async for data in opened.rest:
                yield b"".join(map(told.event, events.push(data)))
        yield events.rest
    except httpx.HTTPError:
        yield _cut(opened)


def _cut(opened: Opened) -> bytes:
    """What ends a stream that the server did not end."""
    log.warning("server %d failed while it was answering", opened.attempt.replica.number)
    opened.attempt.replica.failed()
    return f"\n\n{event_line(_CUT)}data: [DONE]\n\n".encode()
