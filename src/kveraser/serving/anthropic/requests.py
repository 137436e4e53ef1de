"""From the body of a request to a prompt, with Anthropic's defaults. It may take a while: not for the event loop.

Knows: bodies, the service's limits. Does not know about HTTP or what becomes of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kveraser.errors import ApiError
from kveraser.serving.anthropic.context_edits import edited
from kveraser.serving.anthropic.conversion import chat_of
from kveraser.serving.anthropic.protocol import CountRequest, MessagesRequest
from kveraser.serving.chat.answering import Asked
from kveraser.serving.chat.rendering import ChatRenderer
from kveraser.serving.chat.wishes import prompt_of
from kveraser.serving.decoding import Sampling
from kveraser.serving.service import Service


@dataclass(frozen=True)
class AskedMessage:
    """What a request asks for.

    Attributes:
        applied: what was cleared, as Anthropic reports it; None where nothing was asked for.
        is_cut: whether the reply has less room than was asked for.
    """

    asked: Asked
    applied: tuple[dict[str, Any], ...] | None
    is_cut: bool


def message_asked(service: Service, renderer: ChatRenderer, body: MessagesRequest, owner: str) -> AskedMessage:
    """What `POST /v1/messages` asks for.

    Raises:
        ApiError: the chat template refuses it; something in it does not fit together.
        ContextError: it can never be answered: too many tokens.
    """
    if body.thread is not None:
        text = "thread: conversations are not kept for clients; send the whole conversation without it"
        raise ApiError(400, text, code="thread_unsupported_request", param="thread")
    made = edited(renderer, chat_of(body), body.context_management)
    ids = made.rendered.ids
    limit = max(min(body.max_tokens, service.limits.longest - len(ids)), 1)
    sampling = Sampling(
        max_tokens=limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        stop=tuple(body.stop_sequences or ()),
    )
    prompt = prompt_of(service, owner, ids, sampling, body.kveraser)
    service.check(prompt)
    asked = Asked(prompt, made.rendered.told, made.rendered.reader)
    return AskedMessage(asked, made.applied if body.context_management else None, limit < body.max_tokens)


def token_count(renderer: ChatRenderer, body: CountRequest) -> dict[str, Any]:
    """The answer to `POST /v1/messages/count_tokens`.

    Raises:
        ApiError: as for a message.
    """
    made = edited(renderer, chat_of(body), body.context_management)
    count: dict[str, Any] = {"input_tokens": len(made.rendered.ids)}
    if body.context_management:
        count["context_management"] = {"original_input_tokens": made.before}
    return count
