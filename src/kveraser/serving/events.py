"""Server-sent events: what happens in the worker's thread, line by line to a client.

Knows: the format of events, how a stream ends. Does not know what the events are.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from kveraser.serving.errors import describe, error_body
from kveraser.serving.waiting import first_of

EVENT_STREAM = "text/event-stream"
"""The media type of server-sent events."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {}}}}
"""What OpenAPI is told of a route that also streams."""


_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event_line(value: dict[str, Any]) -> str:
    """One server-sent event, which is one line also for clients to whom Unicode's line breaks end one."""
    return f"data: {json.dumps(value, ensure_ascii=False).translate(_BREAKS)}\n\n"


async def event_response(request: Request, events: AsyncGenerator[dict[str, Any]]) -> StreamingResponse:
    """Events as they are; an error before the first of them has a status of its own."""
    first = await first_of(request, events)

    async def lines() -> AsyncGenerator[str]:
        yield event_line(first)
        async for event in events:
            yield event_line(event)

    return line_response(lines(), events)


def line_response(lines: AsyncGenerator[str], events: AsyncGenerator[Any]) -> StreamingResponse:
    """Server-sent lines made of events; the work behind the events stops when the client goes away."""
    return StreamingResponse(_to_the_end(lines, events), media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})


async def _to_the_end(lines: AsyncGenerator[str], events: AsyncGenerator[Any]) -> AsyncIterator[str]:
    """The lines; an error becomes a line (the status has been sent), and `[DONE]` ends them."""
    try:
        async for line in lines:
            yield line
    except Exception as error:
        status, message, code, param, _ = describe(error)
        yield event_line(error_body(status, message, code, param))
    finally:
        await lines.aclose()
        await events.aclose()
    yield "data: [DONE]\n\n"
