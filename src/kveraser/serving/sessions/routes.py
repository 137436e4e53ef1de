"""The endpoints of sessions.

Knows: routes, JSON. Does not know how a session does what it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from kveraser.context import RepairProgress
from kveraser.serving.access import Owner
from kveraser.serving.events import STREAMS, event_response
from kveraser.serving.fields import template_role
from kveraser.serving.service import Service
from kveraser.serving.sessions.asking import SessionReply, ask, compare_versions
from kveraser.serving.sessions.comparing import Event, VersionAnswer
from kveraser.serving.sessions.protocol import (
    CompareBody,
    EraseBody,
    GenerateBody,
    NewMessage,
    NewText,
    ReceiptBody,
    ReplaceBody,
    SelectionBody,
)
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.sessions.showing import pair, restored, show, show_readers, shown
from kveraser.serving.stopping import stoppable
from kveraser.serving.waiting import run, stream
from kveraser.serving.worker import Job
from kveraser.spans import Span

PROGRESS_CHUNK = 128
"""Tokens that a repair runs at once when its progress is watched."""

SessionId = Annotated[str, Path(max_length=64)]
Response = dict[str, Any] | StreamingResponse


def session_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])
    sessions = Sessions(service.store, service.limits)

    @router.post("", status_code=201)
    async def create(request: Request, owner: Owner) -> dict[str, Any]:
        """Create an empty session."""
        return {"id": await run(service, request, lambda job: sessions.create(owner).id)}

    @router.get("")
    async def list_sessions(request: Request, owner: Owner) -> dict[str, Any]:
        """The ids of all sessions of this key."""
        return {"data": await run(service, request, lambda job: sessions.names(owner))}

    @router.get("/{session_id}")
    async def show_session(session_id: SessionId, request: Request, owner: Owner) -> dict[str, Any]:
        """The ledger: messages, live and erased runs, erases that can be undone."""
        return {"id": session_id, **await run(service, request, lambda job: show(sessions.get(owner, session_id)))}

    @router.delete("/{session_id}")
    async def delete(session_id: SessionId, request: Request, owner: Owner) -> dict[str, Any]:
        """Forget a session and its files."""
        await run(service, request, lambda job: sessions.delete(owner, session_id))
        return {"id": session_id, "deleted": True}

    @router.post("/{session_id}/messages", status_code=201)
    async def append_message(session_id: SessionId, body: NewMessage, request: Request, owner: Owner) -> dict[str, Any]:
        """Process a message; the answer has the span of its content."""

        def work(job: Job) -> Span:
            return sessions.append_message(owner, session_id, template_role(body.role), body.content, body.id)

        return {"id": body.id, "span": pair(await run(service, request, stoppable(work)))}

    @router.post("/{session_id}/text", status_code=201)
    async def append_text(session_id: SessionId, body: NewText, request: Request, owner: Owner) -> dict[str, Any]:
        """Process text as it is; the answer has its span."""
        span = await run(service, request, stoppable(lambda job: sessions.append_text(owner, session_id, body.text)))
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
            receipt = sessions.erase(owner, session_id, body.selection(), body.method, purge=body.purge)
            # After a purge the session is exact, whatever the erase itself was.
            return {**shown(receipt), "exact": receipt.exact or body.purge, "purged": body.purge}

        return await run(service, request, stoppable(work))

    @router.post("/{session_id}/replace")
    async def replace(session_id: SessionId, body: ReplaceBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Let a text, a message, token spans or a selection say something else, as if it had always been that."""

        def work(job: Job) -> dict[str, Any]:
            return shown(sessions.replace(owner, session_id, body.selection(), body.new, body.method))

        return await run(service, request, stoppable(work))

    @router.post("/{session_id}/readers")
    async def readers(session_id: SessionId, body: SelectionBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Who has read something: the tokens whose attention went to it, the most attentive first. Changes nothing."""

        def work(job: Job) -> dict[str, Any]:
            return show_readers(sessions.get(owner, session_id), body.selection())

        return await run(service, request, stoppable(work))

    @router.post("/{session_id}/restore")
    async def restore(session_id: SessionId, body: ReceiptBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Undo an erase."""
        return restored(
            await run(service, request, stoppable(lambda job: sessions.restore(owner, session_id, body.erase)))
        )

    @router.post("/{session_id}/purge")
    async def purge(session_id: SessionId, body: ReceiptBody, request: Request, owner: Owner) -> dict[str, Any]:
        """Make an erase final that was made before."""

        def work(job: Job) -> dict[str, Any]:
            return {**shown(sessions.purge(owner, session_id, body.erase)), "exact": True, "purged": True}

        return await run(service, request, stoppable(work))

    @router.post("/{session_id}/repair", response_model=None, responses=STREAMS)
    async def repair(
        session_id: SessionId,
        request: Request,
        owner: Owner,
        stream_it: Annotated[
            bool, Query(alias="stream", description="Send `done` of `total` tokens as they come.")
        ] = False,
    ) -> Response:
        """Recompute exactly what approximate erases left."""

        def repaired(tokens: int) -> dict[str, Any]:
            return {"exact": True, "tokens_recomputed": tokens}

        def work(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
            def tell(progress: RepairProgress) -> None:
                emit({"done": progress.done, "total": progress.total})

            emit(repaired(sessions.repair(owner, session_id, job, chunk=PROGRESS_CHUNK, emit=tell)))

        if stream_it:
            return await event_response(request, stream(service, work))
        return repaired(await run(service, request, stoppable(lambda job: sessions.repair(owner, session_id, job))))

    @router.post("/{session_id}/generate", response_model=None, responses=STREAMS)
    async def generate(session_id: SessionId, body: GenerateBody, request: Request, owner: Owner) -> Response:
        """Ask within a session, which stays as it is unless `keep` is true."""

        def answer(job: Job, emit: Callable[[str], None] | None = None) -> SessionReply:
            return ask(sessions, owner, session_id, body.prompt, body.sampling(), body.keep, job, emit)

        def facts(reply: SessionReply) -> dict[str, Any]:
            return {"prompt_tokens": reply.prompt_tokens, "kveraser": asdict(reply.reuse)}

        def work(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
            emit(facts(answer(job, lambda text: emit({"text": text}))))

        if body.stream:
            return await event_response(request, stream(service, work))
        reply = await run(service, request, answer)
        return {"text": reply.text, **facts(reply)}

    @router.post("/{session_id}/compare", response_model=None, responses=STREAMS)
    async def compare(session_id: SessionId, body: CompareBody, request: Request, owner: Owner) -> Response:
        """Ask `before` the erases, `now`, and of the session `recomputed`; it stays as it is. Answers are greedy."""

        def as_json(event: Event) -> Event:
            answer = event.get("answer")
            return {**event, "answer": asdict(answer)} if isinstance(answer, VersionAnswer) else event

        def work(job: Job, emit: Callable[[Event], None]) -> None:
            found = compare_versions(
                sessions, owner, session_id, body.question(), job, lambda event: emit(as_json(event))
            )
            emit({"distributions": asdict(found.distributions)})

        if body.stream:
            return await event_response(request, stream(service, work))
        question = body.question()
        found = await run(service, request, lambda job: compare_versions(sessions, owner, session_id, question, job))
        return asdict(found)

    return router
