"""Replies in OpenAI's JSON, whole or as the chunks of a stream.

Knows: OpenAI's objects, the text of tokens. Does not know how a reply is made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from kveraser.serving.chat.answering import Answer, Progress
from kveraser.serving.chat.reading import CallPiece, Piece, TextPiece
from kveraser.serving.completion import Reply
from kveraser.serving.decoding import TokenLogprob
from kveraser.serving.events import event_line
from kveraser.serving.openai.token_bytes import TokenBytes
from kveraser.serving.waiting import with_first


class ChatShape:
    """The JSON of chat completions.

    Args:
        tokenizer: for the text of tokens.
        name: of the model.
    """

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.token_bytes = tokenizer, TokenBytes(tokenizer)
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self, answer: Answer, logprobs: bool) -> dict[str, Any]:
        """A reply that is not streamed."""
        reply = answer.reply
        shown = self.logprobs(tuple(reply.tokens), 0) if logprobs else None
        choice = {"index": 0, **self.content(answer), "logprobs": shown, "finish_reason": finish_reason(answer)}
        return {
            **self.head,
            "object": self.object,
            "choices": [choice],
            "usage": usage(reply),
            "kveraser": answer.report(),
        }

    def chunk(self, delta: dict[str, Any], shown: Any, finish_reason: str | None) -> dict[str, Any]:
        """A part of a streamed reply."""
        choice = {"index": 0, **delta, "logprobs": shown, "finish_reason": finish_reason}
        return {**self.head, "object": self.chunk_object, "choices": [choice]}

    def content(self, answer: Answer) -> dict[str, Any]:
        """What the reply holds, in a choice."""
        calls = [piece for piece in answer.pieces if isinstance(piece, CallPiece)]
        text = _text(answer.pieces)
        message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        shown = [{"id": call_id(), "type": "function", "function": asdict(call)} for call in calls]
        return {"message": {**message, "tool_calls": shown} if calls else message}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        """More of the reply's text in a streamed choice."""
        return {"delta": {"content": text} if text else {}}

    def call_deltas(self, index: int, call: CallPiece) -> Iterator[dict[str, Any]]:
        """A call in streamed choices: what is called, then with what."""
        function = {"name": call.name, "arguments": ""}
        yield {"delta": {"tool_calls": [{"index": index, "id": call_id(), "type": "function", "function": function}]}}
        yield {"delta": {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]}}

    def logprobs(self, tokens: tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
        """Log-probabilities in a choice."""
        return {"content": [{**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*e) for e in t.top]}
                            for t in tokens], "refusal": None}  # fmt: skip

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(self.token_bytes.of(token))}

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class CompletionShape(ChatShape):
    """The JSON of text completions, as far as it differs."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def content(self, answer: Answer) -> dict[str, Any]:
        return {"text": _text(answer.pieces)}

    def first(self) -> dict[str, Any] | None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
        texts = [self.token_text(token.id) for token in tokens]
        offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
        top = [{self.token_text(token): max(value, -9999.0) for token, value in entry.top} for entry in tokens]
        values = [max(token.logprob, -9999.0) for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def call_id() -> str:
    """A name for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def finish_reason(answer: Answer) -> str:
    """Why a reply ended: what it holds goes before how."""
    return "tool_calls" if answer.calls and answer.reply.finish_reason == "stop" else answer.reply.finish_reason


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def usage(reply: Reply) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.reuse.tokens_reused},
    }


async def reply_lines(
    first: Progress, events: AsyncGenerator[Progress], shape: ChatShape, logprobs: bool, with_usage: bool
) -> AsyncGenerator[str]:
    """A streamed reply as server-sent events."""
    offset, calls, answer = 0, 0, first[2]
    none_yet = {"usage": None} if with_usage else {}
    opening = shape.first()
    if opening is not None:
        yield event_line({**shape.chunk(opening, None, None), **none_yet})

    async for delta, pieces, _ in with_first(first, events):
        shown = shape.logprobs(delta.tokens, offset) if logprobs and delta.tokens else None
        parts: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, CallPiece):
                parts += shape.call_deltas(calls, piece)
                calls += 1
            else:
                parts.append(shape.delta(piece.text))
        if shown and not parts:
            parts.append(shape.delta(""))
        for part in parts:
            yield event_line({**shape.chunk(part, shown, None), **none_yet})
            shown = None
        if delta.finish_reason:
            last = shape.chunk(shape.delta(""), None, finish_reason(answer))
            yield event_line({**last, **none_yet, "kveraser": answer.report()})
        offset += sum(len(shape.token_text(token.id)) for token in delta.tokens)
    if with_usage:
        yield event_line({**shape.head, "object": shape.chunk_object, "choices": [], "usage": usage(answer.reply),
                     "kveraser": answer.report()})  # fmt: skip
