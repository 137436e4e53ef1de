"""Replies in Anthropic's JSON, whole or as the events of a stream.

Knows: Anthropic's objects and events. Does not know how a reply is made.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any

from kveraser.serving.chat.answering import Answer, Progress
from kveraser.serving.chat.reading import CallPiece, Piece, ThinkingPiece
from kveraser.serving.events import event_line
from kveraser.serving.waiting import with_first

Event = dict[str, Any]
_PING: Event = {"type": "ping"}
_QUIET = 5.0  # seconds without an event before a client is told that the server is there


class Shape:
    """The JSON of one message.

    Args:
        name: of the model.
        applied: what was cleared, where that was asked for.
        is_cut: whether the reply has less room than was asked for.
    """

    def __init__(self, name: str, applied: tuple[dict[str, Any], ...] | None, is_cut: bool) -> None:
        self._name, self._is_cut = name, is_cut
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._management = {} if applied is None else {"context_management": {"applied_edits": list(applied)}}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A reply that is not streamed."""
        content = [block(piece) for piece in answer.pieces]
        return {
            **self.head(answer),
            "content": content,
            **self._end(answer),
            "usage": usage(answer),
            **self._management,
        }

    def head(self, answer: Answer) -> dict[str, Any]:
        """A message without its content."""
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        about = {"id": self._id, "type": "message", "role": "assistant", "model": self._name}
        return {**about, **nothing, "usage": usage(answer), "kveraser": answer.report()}

    def last(self, answer: Answer) -> Iterator[Event]:
        """The events that end a stream."""
        more = {**self._management, "kveraser": answer.report()}
        yield {"type": "message_delta", "delta": self._end(answer), "usage": usage(answer), **more}
        yield {"type": "message_stop"}

    def _end(self, answer: Answer) -> dict[str, Any]:
        reply = answer.reply
        if reply.finish_reason == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
        elif reply.stopped_by is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if answer.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": reply.stopped_by}


class BlockEvents:
    """The events of the blocks of one message."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type[Piece] | None = None

    def push(self, pieces: Iterable[Piece]) -> Iterator[Event]:
        """The events of more of a reply."""
        for piece in pieces:
            if isinstance(piece, CallPiece) or type(piece) is not self._open:
                yield from self.close()
                self._index, self._open = self._index + 1, type(piece)
                yield {"type": "content_block_start", "index": self._index, "content_block": _empty(piece)}
                if self._index == 0:
                    yield _PING
            if isinstance(piece, CallPiece):
                yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
            elif isinstance(piece, ThinkingPiece):
                yield self._delta({"type": "thinking_delta", "thinking": piece.text})
            else:
                yield self._delta({"type": "text_delta", "text": piece.text})

    def close(self) -> Iterator[Event]:
        """The events that end the last block."""
        if self._open is ThinkingPiece:
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def block(piece: Piece) -> dict[str, Any]:
    """A piece of a reply as a block."""
    if isinstance(piece, CallPiece):
        return {**_empty(piece), "input": json.loads(piece.arguments)}
    if isinstance(piece, ThinkingPiece):
        return {**_empty(piece), "thinking": piece.text}
    return {**_empty(piece), "text": piece.text}


def _empty(piece: Piece) -> dict[str, Any]:
    """The block that a piece begins."""
    if isinstance(piece, CallPiece):
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": piece.name, "input": {}}
    if isinstance(piece, ThinkingPiece):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def usage(answer: Answer) -> dict[str, Any]:
    """Anthropic's `usage`: what was cached is not a part of `input_tokens`."""
    reply = answer.reply
    return {
        "input_tokens": reply.prompt_tokens - reply.reuse.tokens_reused,
        "cache_read_input_tokens": reply.reuse.tokens_reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": reply.completion_tokens,
    }


async def event_lines(first: Progress, events: AsyncGenerator[Progress], shape: Shape) -> AsyncGenerator[str]:
    """A streamed reply as server-sent events."""
    answer, blocks, told = first[2], BlockEvents(), time.monotonic()

    def line(event: Event) -> str:
        return event_line(event, event["type"])

    yield line({"type": "message_start", "message": shape.head(answer)})
    async for _, pieces, _ in with_first(first, events):
        new = list(blocks.push(pieces))
        if not new and time.monotonic() - told > _QUIET:  # a long call is told when it is whole
            new = [_PING]
        for event in new:
            yield line(event)
        told = time.monotonic() if new else told
    for event in (*blocks.close(), *shape.last(answer)):
        yield line(event)
