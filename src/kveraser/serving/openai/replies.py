"""Replies in OpenAI's JSON, whole or as the chunks of a stream.

Knows: OpenAI's objects, the text of tokens. Does not know how a reply is made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from kveraser.serving.completion import Reply
from kveraser.serving.decoding import Delta, TokenLogprob
from kveraser.serving.events import event_line
from kveraser.serving.openai.token_bytes import TokenBytes

Progress = tuple[Delta, Reply]
"""What is new of a reply, and the reply so far."""


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

    def whole(self, reply: Reply, logprobs: bool) -> dict[str, Any]:
        """A reply that is not streamed."""
        shown = self.logprobs(tuple(reply.tokens), 0) if logprobs else None
        choice = {"index": 0, **self.content(reply.text), "logprobs": shown, "finish_reason": reply.finish_reason}
        return {
            **self.head,
            "object": self.object,
            "choices": [choice],
            "usage": usage(reply),
            "kveraser": report(reply),
        }

    def chunk(self, delta: dict[str, Any], shown: Any, finish_reason: str | None) -> dict[str, Any]:
        """A part of a streamed reply."""
        choice = {"index": 0, **delta, "logprobs": shown, "finish_reason": finish_reason}
        return {**self.head, "object": self.chunk_object, "choices": [choice]}

    def content(self, text: str) -> dict[str, Any]:
        """The reply's text in a choice."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        """More of the reply's text in a streamed choice."""
        return {"delta": {"content": text} if text else {}}

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

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first(self) -> dict[str, Any] | None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
        texts = [self.token_text(token.id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
        top = [{self.token_text(token): max(value, -9999.0) for token, value in entry.top} for entry in tokens]
        values = [max(token.logprob, -9999.0) for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def report(reply: Reply) -> dict[str, Any]:
    """The object `kveraser` of a reply."""
    return asdict(reply.reuse)


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
    offset, reply = 0, first[1]
    opening = shape.first()
    if opening is not None:
        yield event_line(shape.chunk(opening, None, None))

    def chunk(delta: Delta) -> dict[str, Any]:
        shown = shape.logprobs(delta.tokens, offset) if logprobs else None
        made = shape.chunk(shape.delta(delta.text), shown, delta.finish_reason)
        return {**made, "kveraser": report(reply)} if delta.finish_reason else made

    async for delta, _ in _with_first(first, events):
        if delta.text or delta.finish_reason or (logprobs and delta.tokens):
            yield event_line(chunk(delta))
        offset += sum(len(shape.token_text(token.id)) for token in delta.tokens)
    if with_usage:
        yield event_line({**shape.head, "object": shape.chunk_object, "choices": [], "usage": usage(reply),
                     "kveraser": report(reply)})  # fmt: skip


async def _with_first(first: Progress, events: AsyncGenerator[Progress]) -> AsyncGenerator[Progress]:
    yield first
    async for event in events:
        yield event
