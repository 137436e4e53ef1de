"""OpenAI's endpoints: models, chat completions, completions.

Knows: routes, what a request asks of its reply. Does not know how bodies become prompts, nor replies JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from kveraser.errors import ApiError
from kveraser.serving.access import Owner, owner_of
from kveraser.serving.chat.answering import Answer, Asked, Progress, answer
from kveraser.serving.chat.rendering import ChatRenderer
from kveraser.serving.events import line_response
from kveraser.serving.metrics import Metrics
from kveraser.serving.openai.protocol import ChatRequest, CompletionRequest
from kveraser.serving.openai.replies import ChatShape, CompletionShape, reply_lines
from kveraser.serving.openai.requests import chat_asked, completion_asked
from kveraser.serving.service import Service
from kveraser.serving.waiting import first_of, run, stream
from kveraser.serving.worker import Job, Turns

Response = dict[str, Any] | StreamingResponse


def openai_router(service: Service, renderer: ChatRenderer, name: str, metrics: Metrics, started: int) -> APIRouter:
    """The routes.

    Args:
        renderer: of conversations, for this model.
        name: the model's name in requests and replies.
        started: when the server started, seconds since the epoch.
    """
    router = APIRouter(tags=["OpenAI"])
    card = {"id": name, "object": "model", "created": started, "owned_by": "kveraser"}
    # Anthropic's clients ask for the same paths, and read other fields.
    made = datetime.fromtimestamp(started, UTC).isoformat().replace("+00:00", "Z")
    card |= {"type": "model", "display_name": name, "created_at": made, "lifecycle": "active"}
    card |= {"max_input_tokens": service.limits.longest, "max_tokens": service.limits.longest}
    page = {"object": "list", "data": [card], "has_more": False, "first_id": name, "last_id": name}

    def check_model(wanted: str) -> None:
        if wanted != name:
            raise ApiError(
                404, f"there is no model {wanted!r}; there is {name!r}", code="model_not_found", param="model"
            )

    @router.get("/v1/models", dependencies=[Depends(owner_of)])
    async def list_models() -> dict[str, Any]:
        """The one model there is."""
        return page

    @router.get("/v1/models/{model:path}", dependencies=[Depends(owner_of)])
    async def get_model(model: str) -> dict[str, Any]:
        """A model by its name."""
        check_model(model)
        return card

    async def respond(
        request: Request, body: ChatRequest | CompletionRequest, asked: Asked, shape: ChatShape
    ) -> Response:
        logprobs = asked.prompt.sampling.logprobs is not None

        def complete(job: Job, emit: Callable[[Progress], None] | None = None) -> Turns[Answer]:
            found = yield from answer(service, asked, job, emit)
            metrics.count(found.reply)
            return found

        if not body.stream:
            return shape.whole(await run(service, request, complete, asked.prompt.owner), logprobs)
        events = stream(service, complete, asked.prompt.owner)
        first = await first_of(request, events)  # an error before the first token has a status of its own
        return line_response(reply_lines(first, events, shape, logprobs, body.with_usage), events)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request, owner: Owner) -> Response:
        """Answer a conversation. The field `kveraser` of the reply says what was reused, and whether it is exact."""
        check_model(body.model)
        asked = await service.beside.run(lambda: chat_asked(service, renderer, body, owner))
        return await respond(request, body, asked, ChatShape(service.tokenizer, name))

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request, owner: Owner) -> Response:
        """Continue a text, or token ids."""
        check_model(body.model)
        asked = await service.beside.run(lambda: completion_asked(service, body, owner))
        return await respond(request, body, asked, CompletionShape(service.tokenizer, name))

    return router
