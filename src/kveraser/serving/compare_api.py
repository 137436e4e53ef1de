"""The endpoint that asks before the erases of a session, now, and after full recomputation.

Knows: JSON and the route. Does not know how answers are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from kveraser.serving.access import Owner
from kveraser.serving.comparing import Event, Question, VersionAnswer
from kveraser.serving.engine import Engine
from kveraser.serving.explicit import Sessions
from kveraser.serving.http_errors import event_response
from kveraser.serving.jobs import Job
from kveraser.serving.protocol import Text
from kveraser.serving.session_api import STREAMS, Body, SessionId
from kveraser.serving.waiting import run, stream


class CompareBody(Body):
    """A question to every version of a session."""

    prompt: Text = Field(min_length=1, description="A user's message if the session is a chat, else text as it is.")
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    first_line: bool = Field(False, description="End every answer with its first line that is not blank.")
    top: Annotated[int, Field(ge=1, le=20)] = Field(5, description="The most likely tokens to report of every version.")
    stream: bool = Field(
        False,
        description="Server-sent events, each of one `version`: `done` of `total` tokens read, more `text`, or `answer` "
        "with all that is known of it; the last has `distributions`.",
    )


def compare_router(engine: Engine) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])
    sessions = Sessions(engine)

    @router.post("/{session_id}/compare", response_model=None, responses=STREAMS)
    async def compare(
        session_id: SessionId, body: CompareBody, request: Request, owner: Owner
    ) -> dict[str, Any] | StreamingResponse:
        """Ask `before` the erases, `now`, and of the session `recomputed`; it stays as it is. Answers are greedy."""
        question = Question(body.prompt, body.max_tokens, body.first_line, body.top)
        if not body.stream:
            found = await run(engine, request, lambda job: sessions.compare(owner, session_id, question, job))
            return asdict(found)

        def work(job: Job, emit: Callable[[Event], None]) -> None:
            emit(
                {
                    "distributions": asdict(
                        sessions.compare(owner, session_id, question, job, lambda e: emit(_json(e))).distributions
                    )
                }
            )

        return await event_response(request, stream(engine, work))

    return router


def _json(event: Event) -> Event:
    answer = event.get("answer")
    return {**event, "answer": asdict(answer)} if isinstance(answer, VersionAnswer) else event
