"""The endpoints of explicit sessions.

Knows: JSON and routes. Does not know how a session does what it is asked.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Annotated, Any, Self, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kveraser.serving.access import Owner
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine
from kveraser.serving.explicit import Answer, Sessions, What, pair, shown
from kveraser.serving.http_errors import to_the_end
from kveraser.serving.jobs import Job
from kveraser.serving.protocol import Count, Text
from kveraser.serving.waiting import event_line, run, stream
from kveraser.spans import Span

T = TypeVar("T")
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


class EraseBody(Body):
    """What to erase: exactly one of `text`, `message`, `spans`."""

    text: Text | None = Field(None, description="A text that occurs once in what is live.")
    message: Name | None = Field(None, description="The id of a message.")
    spans: Annotated[list[tuple[Position, Position]], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Half-open token spans of the ledger."
    )
    method: str = Field("kveraser", max_length=256, description="A name, or NAME:OPTION=VALUE,...")
    purge: bool = Field(False, description="Make it final: repaired exactly, then overwritten everywhere.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.text, self.message, self.spans)) != 1:
            raise ValueError("exactly one of text, message and spans is needed")
        return self


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
        body = EraseBody(text=None, message=message_id, spans=None, method=method, purge=purge)
        return await erase(session_id, body, request, owner)

    @router.post("/{session_id}/erase")
    async def erase(session_id: SessionId, body: EraseBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Erase a text, a message or token spans."""

        def work(job: Job) -> dict[str, Any]:
            what = What(body.text, body.message, tuple(Span(start, end) for start, end in body.spans or ()))
            receipt = sessions.erase(owner, session_id, what, body.method, purge=body.purge)
            # After a purge the session is exact, whatever the erase itself was.
            return {**shown(receipt), "exact": receipt.exact or body.purge, "purged": body.purge}

        return await run(engine, request, work)

    @router.post("/{session_id}/restore")
    async def restore(session_id: SessionId, body: RestoreBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Undo an erase."""
        return await run(engine, request, lambda job: sessions.restore(owner, session_id, body.erase))

    @router.post("/{session_id}/repair")
    async def repair(session_id: SessionId, request: Request, owner: Owner) -> dict[str, Any]:
        """Recompute exactly what approximate erases left."""
        tokens = await run(engine, request, lambda job: sessions.repair(owner, session_id, job))
        return {"exact": True, "tokens_recomputed": tokens}

    @router.post("/{session_id}/generate", response_model=None)
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

        events = stream(engine, work)
        first = await anext(events)  # an error before the first text has a status of its own
        return StreamingResponse(to_the_end(_lines(first, events), events), media_type="text/event-stream")

    return router


def _facts(answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens": answer.prompt_tokens, "kveraser": asdict(answer.reuse)}


async def _lines(first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str]:
    yield event_line(first)
    async for event in events:
        yield event_line(event)
