"""Anthropic's endpoints.

Knows: routes, what a request asks of its reply. Does not know how bodies become prompts, nor replies JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from kveraser.errors import ApiError
from kveraser.serving.access import Owner
from kveraser.serving.anthropic.protocol import CountRequest, MessagesRequest
from kveraser.serving.anthropic.replies import Shape, event_lines
from kveraser.serving.anthropic.requests import message_asked, token_count
from kveraser.serving.chat.answering import Answer, Progress, answer
from kveraser.serving.chat.rendering import ChatRenderer
from kveraser.serving.error_forms import request_id
from kveraser.serving.events import STREAMS, line_response
from kveraser.serving.metrics import Metrics
from kveraser.serving.service import Service
from kveraser.serving.waiting import first_of, run, stream
from kveraser.serving.worker import Job, Turns


def anthropic_router(service: Service, renderer: ChatRenderer, name: str, metrics: Metrics) -> APIRouter:
    """The routes.

    Args:
        renderer: of conversations, for this model.
        name: the model's name in requests and replies.
    """
    router = APIRouter(tags=["Anthropic"])

    def check_model(wanted: str) -> None:
        if wanted != name:
            raise ApiError(404, f"model: there is no model {wanted!r}; there is {name!r}", param="model")

    @router.post("/v1/messages", response_model=None, responses=STREAMS)
    async def create(
        body: MessagesRequest, request: Request, response: Response, owner: Owner
    ) -> dict[str, Any] | StreamingResponse:
        """Answer a conversation. The field `kveraser` of the reply says what was reused, and whether it is exact."""
        check_model(body.model)
        made = await service.beside.run(lambda: message_asked(service, renderer, body, owner))
        shape = Shape(name, made.applied, made.is_cut)

        def complete(job: Job, emit: Callable[[Progress], None] | None = None) -> Turns[Answer]:
            found = yield from answer(service, made.asked, job, emit)
            metrics.count(found.reply)
            return found

        headers = {"request-id": request_id()}
        if not body.stream:
            response.headers.update(headers)
            return shape.whole(await run(service, request, complete, owner))
        events = stream(service, complete, owner)
        first = await first_of(request, events)  # an error before the first token has a status of its own
        lines = event_lines(first, events, shape)
        return line_response(lines, events, request.url.path, error_name="error", last="", headers=headers)

    @router.post("/v1/messages/count_tokens")
    async def count(body: CountRequest, response: Response, owner: Owner) -> dict[str, Any]:
        """How many tokens the prompt of a message would have."""
        check_model(body.model)
        response.headers["request-id"] = request_id()
        return await service.beside.run(lambda: token_count(renderer, body))

    return router
