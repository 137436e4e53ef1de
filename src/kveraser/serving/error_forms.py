"""How an error is written: as OpenAI's clients expect it, and as Anthropic's do where the path is one of theirs.

Knows: both forms, HTTP statuses. Does not know our errors.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ANTHROPIC_PATHS = ("/v1/messages",)

_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
           429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # fmt: skip
_ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
              413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 504: "timeout_error",
              529: "overloaded_error"}  # fmt: skip
_BY_CODE = {"queue_full": 529, "stopping": 529, "timeout": 504}
"""Statuses that Anthropic's clients know, where OpenAI's are others."""


@dataclass(frozen=True)
class Problem:
    """What went wrong, in no API's words.

    Attributes:
        code: names it, for programs.
        param: the field of the request that it comes from.
        headers: of the response.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """An error as it is sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's clients ask for that path."""
    return any(path == each or path.startswith(f"{each}/") for each in _ANTHROPIC_PATHS)


def request_id() -> str:
    """A name for a request, as Anthropic's clients show it."""
    return f"req_{uuid.uuid4().hex[:24]}"


def written(problem: Problem, path: str = "") -> Written:
    """An error in the form that the clients of a path expect."""
    text = problem.message.encode("utf-8", "replace").decode()
    if not is_anthropic(path):
        kind = _OPENAI.get(problem.status, "invalid_request_error")
        told = {"message": text, "type": kind, "param": problem.param, "code": problem.code}
        return Written(problem.status, {"error": told}, dict(problem.headers))
    status = _BY_CODE.get(problem.code or "", problem.status)
    if problem.param and not text.startswith(problem.param):
        text = f"{problem.param}: {text}"
    name = request_id()
    error: dict[str, Any] = {"type": _ANTHROPIC.get(status, "invalid_request_error"), "message": text}
    if problem.code:
        error["details"] = {"error_code": problem.code}
    body = {"type": "error", "error": error, "request_id": name}
    return Written(status, body, {**problem.headers, "request-id": name})
