"""OpenAI's endpoints: models, chat completions, completions.

Knows: OpenAI's JSON. Does not know how a prompt gets into a context.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from jinja2 import TemplateError

from kveraser.serving.access import Owner, owner_of
from kveraser.serving.decoding import Piece, TokenLogprob
from kveraser.serving.engine import Engine, Policy, Prompt, Reply
from kveraser.serving.http_errors import EVENT_STREAM, ApiError, to_the_end
from kveraser.serving.jobs import Job
from kveraser.serving.metrics import Metrics
from kveraser.serving.protocol import ChatRequest, CompletionRequest
from kveraser.serving.waiting import event_line, first_of, run, stream

Event = tuple[Piece, Reply]
Answer = dict[str, Any] | StreamingResponse


class Shape:
    """How chat and text completions differ in JSON: chat.

    Args:
        engine: for the text of tokens.
        name: of the model.
    """

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
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
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return str(self.engine.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class TextShape(Shape):
    """Text completions."""

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


def openai_router(engine: Engine, name: str, metrics: Metrics, started: int) -> APIRouter:
    """The routes.

    Args:
        name: the model's name in requests and replies.
        started: when the server started, seconds since the epoch.
    """
    router = APIRouter(tags=["OpenAI"])
    card = {"id": name, "object": "model", "created": started, "owned_by": "kveraser"}

    def check_model(wanted: str) -> None:
        if wanted != name:
            raise ApiError(
                404, f"there is no model {wanted!r}; there is {name!r}", code="model_not_found", param="model"
            )

    @router.get("/v1/models", dependencies=[Depends(owner_of)])
    async def list_models() -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}", dependencies=[Depends(owner_of)])
    async def get_model(model: str) -> dict[str, Any]:
        """A model by its name."""
        check_model(model)
        return card

    async def answer(request: Request, prompt: Prompt, shape: Shape, streamed: bool, with_usage: bool) -> Answer:
        engine.check(prompt)
        logprobs = prompt.sampling.logprobs is not None

        def counted(reply: Reply) -> Reply:
            metrics.count(reply)
            return reply

        if not streamed:
            reply = await run(engine, request, lambda job: counted(engine.complete(prompt, job)))
            return shape.whole(reply, logprobs)

        def work(job: Job, emit: Callable[[Event], None]) -> None:
            counted(engine.complete(prompt, job, lambda piece, reply: emit((piece, reply))))

        events = stream(engine, work)
        first = await first_of(request, events)  # an error before the first token has a status of its own
        lines = to_the_end(_lines(first, events, shape, logprobs, with_usage), events)
        return StreamingResponse(lines, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request, owner: Owner) -> Answer:
        """Answer a conversation. The field `kveraser` of the reply says what was reused, and whether it is exact."""
        check_model(body.model)
        ids = _chat_ids(engine, body)
        rest = engine.context_length - len(ids)
        limit = body.max_completion_tokens or body.max_tokens or max(min(rest, engine.options.max_reply), 1)
        sampling = body.sampling(limit, (body.top_logprobs or 0) if body.logprobs else None)
        prompt = Prompt(owner, ids, _policy(engine, body.kveraser.policy), sampling)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await answer(request, prompt, Shape(engine, name), body.stream, with_usage)

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request, owner: Owner) -> Answer:
        """Continue a text, or token ids."""
        check_model(body.model)
        ids = engine.tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        if any(token >= engine.vocabulary for token in ids):
            raise ApiError(400, f"a token id is outside the vocabulary of {engine.vocabulary}", param="prompt")
        sampling = body.sampling(body.max_tokens or 16, body.logprobs)
        prompt = Prompt(owner, tuple(ids), _policy(engine, body.kveraser.policy), sampling)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await answer(request, prompt, TextShape(engine, name), body.stream, with_usage)

    return router


def _policy(engine: Engine, wanted: Policy | None) -> Policy:
    return wanted or engine.options.policy


def _chat_ids(engine: Engine, body: ChatRequest) -> tuple[int, ...]:
    entries = [message.entry() for message in body.messages]
    try:
        text = engine.tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from error
    return tuple(engine.tokenizer.encode(str(text), add_special_tokens=False))


async def _lines(
    first: Event, events: AsyncGenerator[Event], shape: Shape, logprobs: bool, with_usage: bool
) -> AsyncGenerator[str]:
    """A streamed reply as server-sent events."""
    offset, reply = 0, first[1]
    opening = shape.first()
    if opening is not None:
        yield event_line(shape.chunk(opening, None, None))

    def chunk(piece: Piece) -> dict[str, Any]:
        shown = shape.logprobs(piece.tokens, offset) if logprobs else None
        made = shape.chunk(shape.delta(piece.text), shown, piece.finish_reason)
        return {**made, "kveraser": report(reply)} if piece.finish_reason else made

    def interesting(piece: Piece) -> bool:
        return bool(piece.text or piece.finish_reason or (logprobs and piece.tokens))

    if interesting(first[0]):
        yield event_line(chunk(first[0]))
    offset += sum(len(shape.token_text(token.id)) for token in first[0].tokens)
    async for piece, _ in events:
        if interesting(piece):
            yield event_line(chunk(piece))
        offset += sum(len(shape.token_text(token.id)) for token in piece.tokens)
    if with_usage:
        yield event_line({**shape.head, "object": shape.chunk_object, "choices": [], "usage": usage(reply),
                     "kveraser": report(reply)})  # fmt: skip
