"""Server-sent events: what happens in the worker's thread, line by line to a client.

Knows: the format of events, how a stream ends. Does not know what the events are.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from kveraser.serving.error_forms import written
from kveraser.serving.errors import describe
from kveraser.serving.waiting import first_of

EVENT_STREAM = "text/event-stream"
"""The media type of server-sent events."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {}}}}
"""What OpenAPI is told of a route that also streams."""


_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event_line(value: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event, which is one line also for clients to whom Unicode's line breaks end one.

    Args:
        name: of the event, where clients go by it.
    """
    data = f"data: {json.dumps(value, ensure_ascii=False).translate(_BREAKS)}\n\n"
    return data if name is None else f"event: {name}\n{data}"


async def event_response(request: Request, events: AsyncGenerator[dict[str, Any]]) -> StreamingResponse:
    """Events as they are; an error before the first of them has a status of its own."""
    first = await first_of(request, events)

    async def lines() -> AsyncGenerator[str]:
        yield event_line(first)
        async for event in events:
            yield event_line(event)

    return line_response(lines(), events)


def line_response(
    lines: AsyncGenerator[str],
    events: AsyncGenerator[Any],
    path: str = "",
    *,
    error_name: str | None = None,
    last: str = "data: [DONE]\n\n",
    headers: Mapping[str, str] | None = None,
) -> StreamingResponse:
    """Server-sent lines made of events; the work behind the events stops when the client goes away.

    Args:
        path: that was asked for: errors have its form.
        error_name: of the event that tells an error.
        last: ends the stream.
    """
    told = _to_the_end(lines, events, lambda error: event_line(written(describe(error), path).body, error_name), last)
    return StreamingResponse(told, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store", **(headers or {})})


async def _to_the_end(
    lines: AsyncGenerator[str], events: AsyncGenerator[Any], failed: Callable[[Exception], str], last: str
) -> AsyncIterator[str]:
    """The lines; an error becomes a line (the status has been sent), and `last` ends them."""
    try:
        async for line in lines:
            yield line
    except Exception as error:
        yield failed(error)
    finally:
        await lines.aclose()
        await events.aclose()
    if last:
        yield last
