"""The endpoints of explicit sessions.

Knows: JSON and routes. Does not know how a session does what it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Self

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kveraser.context import RepairProgress
from kveraser.serving.access import Owner
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine
from kveraser.serving.explicit import Answer, Sessions, What, pair, shown
from kveraser.serving.http_errors import EVENT_STREAM, event_response
from kveraser.serving.jobs import Job
from kveraser.serving.protocol import Count, Text
from kveraser.serving.waiting import run, stream
from kveraser.spans import Span

PROGRESS_CHUNK = 128
"""Tokens that a repair runs at once when its progress is watched."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {}}}}
"""What OpenAPI is told of a route that also streams."""

Position = Annotated[int, Field(ge=0, le=1 << 31)]
SessionId = Annotated[str, Path(max_length=64)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A body in which every field must be known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class NewMessage(Body):
    """A message to be appended."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text
    id: Name | None = Field(None, description="A name by which the message can be erased.")


class NewText(Body):
    """Text to be appended as it is."""

    text: Text = Field(min_length=1)


class WhatBody(Body):
    """What in a session: exactly one of `text`, `message`, `spans`, `characters`."""

    text: Text | None = Field(None, description="A text that occurs once in what is live.")
    message: Name | None = Field(None, description="The id of a message.")
    spans: Annotated[list[tuple[Position, Position]], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Half-open token spans of the ledger."
    )
    characters: Annotated[list[tuple[Position, Position]], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Half-open ranges of code points in the session's text: that of its `runs`, joined."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.text, self.message, self.spans, self.characters)) != 1:
            raise ValueError("exactly one of text, message, spans and characters is needed")
        return self

    def what(self) -> What:
        """The same for sessions."""
        spans = tuple(Span(start, end) for start, end in self.spans or ())
        return What(self.text, self.message, spans, tuple(self.characters or ()))


class EraseBody(WhatBody):
    """What to erase, and how."""

    method: str = Field("kveraser", max_length=256, description="A name, or NAME:OPTION=VALUE,...")
    purge: bool = Field(False, description="Make it final: repaired exactly, then overwritten everywhere.")


class RestoreBody(Body):
    """Which erase to undo."""

    erase: Name = Field(description="The id of the erase.")


class GenerateBody(Body):
    """A question, or nothing to go on with what is there."""

    prompt: Text | None = None
    max_tokens: Count = 64
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    keep: bool = Field(False, description="Append question and reply to the session.")
    stream: bool = Field(False, description="Server-sent events: `text` as it comes, then one with all but the text.")


def session_router(engine: Engine) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])
    sessions = Sessions(engine)

    @router.post("", status_code=201)
    async def create(request: Request, owner: Owner) -> dict[str, Any]:
        """Create an empty session."""
        return {"id": await run(engine, request, lambda job: sessions.create(owner).id)}

    @router.get("")
    async def list_sessions(request: Request, owner: Owner) -> dict[str, Any]:
        """The ids of all sessions of this key."""
        return {"data": await run(engine, request, lambda job: engine.store.sessions(owner))}

    @router.get("/{session_id}")
    async def show(session_id: SessionId, request: Request, owner: Owner) -> dict[str, Any]:
        """The ledger: messages, live and erased runs, erases that can be undone."""
        return {"id": session_id, **await run(engine, request, lambda job: sessions.show(owner, session_id))}

    @router.delete("/{session_id}")
    async def delete(session_id: SessionId, request: Request, owner: Owner) -> dict[str, Any]:
        """Forget a session and its files."""
        await run(engine, request, lambda job: sessions.delete(owner, session_id))
        return {"id": session_id, "deleted": True}

    @router.post("/{session_id}/messages", status_code=201)
    async def append_message(session_id: SessionId, body: NewMessage, request: Request, owner: Owner) -> dict[str, Any]:
        """Process a message; the answer has the span of its content."""

        def work(job: Job) -> Span:
            return sessions.append_message(owner, session_id, body.role, body.content, body.id)

        return {"id": body.id, "span": pair(await run(engine, request, work))}

    @router.post("/{session_id}/text", status_code=201)
    async def append_text(session_id: SessionId, body: NewText, request: Request, owner: Owner) -> dict[str, Any]:
        """Process text as it is; the answer has its span."""
        span = await run(engine, request, lambda job: sessions.append_text(owner, session_id, body.text))
        return {"span": pair(span)}

    @router.delete("/{session_id}/messages/{message_id}")
    async def erase_message(
        session_id: SessionId,
        message_id: Annotated[str, Path(min_length=1, max_length=256)],
        request: Request,
        owner: Owner,
        method: Annotated[str, Query(max_length=256)] = "kveraser",
        purge: bool = False,
    ) -> dict[str, Any]:
        """Erase the content of a message."""
        body = EraseBody(text=None, message=message_id, spans=None, characters=None, method=method, purge=purge)
        return await erase(session_id, body, request, owner)

    @router.post("/{session_id}/erase")
    async def erase(session_id: SessionId, body: EraseBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Erase a text, a message, token spans or a selection."""

        def work(job: Job) -> dict[str, Any]:
            receipt = sessions.erase(owner, session_id, body.what(), body.method, purge=body.purge)
            # After a purge the session is exact, whatever the erase itself was.
            return {**shown(receipt), "exact": receipt.exact or body.purge, "purged": body.purge}

        return await run(engine, request, work)

    @router.post("/{session_id}/readers")
    async def readers(session_id: SessionId, body: WhatBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Who has read something: the tokens whose attention went to it, the most attentive first. Changes nothing."""
        return await run(engine, request, lambda job: sessions.readers(owner, session_id, body.what()))

    @router.post("/{session_id}/restore")
    async def restore(session_id: SessionId, body: RestoreBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Undo an erase."""
        return await run(engine, request, lambda job: sessions.restore(owner, session_id, body.erase))

    @router.post("/{session_id}/repair", response_model=None, responses=STREAMS)
    async def repair(
        session_id: SessionId,
        request: Request,
        owner: Owner,
        stream_it: Annotated[
            bool, Query(alias="stream", description="Send `done` of `total` tokens as they come.")
        ] = False,
    ) -> dict[str, Any] | StreamingResponse:
        """Recompute exactly what approximate erases left."""
        if not stream_it:
            return repaired(await run(engine, request, lambda job: sessions.repair(owner, session_id, job)))

        def work(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
            def tell(progress: RepairProgress) -> None:
                emit({"done": progress.done, "total": progress.total})

            emit(repaired(sessions.repair(owner, session_id, job, chunk=PROGRESS_CHUNK, emit=tell)))

        return await event_response(request, stream(engine, work))

    def repaired(tokens: int) -> dict[str, Any]:
        return {"exact": True, "tokens_recomputed": tokens}

    @router.post("/{session_id}/generate", response_model=None, responses=STREAMS)
    async def generate(
        session_id: SessionId, body: GenerateBody, request: Request, owner: Owner
    ) -> dict[str, Any] | StreamingResponse:
        """Ask within a session, which stays as it is unless `keep` is true."""
        sampling = Sampling(body.max_tokens, body.temperature, body.top_p, body.seed)

        def answer(job: Job, emit: Callable[[str], None] | None = None) -> Answer:
            return sessions.generate(owner, session_id, body.prompt, sampling, body.keep, job, emit)

        if not body.stream:
            reply = await run(engine, request, answer)
            return {"text": reply.text, **_facts(reply)}

        def work(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
            emit(_facts(answer(job, lambda text: emit({"text": text}))))

        return await event_response(request, stream(engine, work))

    return router


def _facts(answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens": answer.prompt_tokens, "kveraser": asdict(answer.reuse)}
