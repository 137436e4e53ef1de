"""Every error as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}`.

Knows: HTTP statuses, our errors. Does not know about models or requests' meaning. Never logs what a client sent.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kveraser.errors import (
    ApiError,
    ContextLengthError,
    JobCancelledError,
    JobTimeoutError,
    KVEraserError,
    QueueFullError,
    SessionFileError,
    SessionNotFoundError,
)
from kveraser.serving.invalid import explain

log = logging.getLogger("kveraser.serving")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
          429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # fmt: skip

_NO_RETRY = {
    "x-should-retry": "false"
}  # OpenAI's clients try again by themselves unless they are told that it is of no use


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error")
    text = message.encode("utf-8", "replace").decode()
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def describe(error: BaseException) -> tuple[int, str, str | None, str | None, dict[str, str]]:
    """Status, message, code, param and headers of an error."""
    if isinstance(error, ApiError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return error.status, str(error), error.code, error.param, headers
    if isinstance(error, QueueFullError):
        return 429, str(error), "queue_full", None, {"Retry-After": str(error.retry_after)}
    if isinstance(error, JobTimeoutError):
        return 408, str(error), "timeout", None, _NO_RETRY
    if isinstance(error, JobCancelledError):
        return 503, str(error), "stopping", None, {"Retry-After": "5"}
    if isinstance(error, ContextLengthError):
        return 400, str(error), "context_length_exceeded", error.param, {}
    if isinstance(error, RecursionError):  # ours end; what a client nests may not
        return 400, "the request is nested too deeply", "invalid_value", None, {}
    if isinstance(error, SessionNotFoundError):
        return 404, str(error), "session_not_found", None, {}
    if isinstance(error, KVEraserError):
        # A file name is the server's business alone.
        text = "the session cannot be read from disk" if isinstance(error, SessionFileError) else str(error)
        return 400, text, type(error).__name__, None, {}
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f"{Path(place[0].filename).name}:{place[0].lineno}" if place else "?"
    log.error("unexpected %s at %s", type(error).__name__, where)  # not its text: it may quote a prompt
    return 500, "the server made a mistake; its log says where", "internal_error", None, _NO_RETRY


def error_response(error: BaseException) -> JSONResponse:
    """An error as a response."""
    status, message, code, param, headers = describe(error)
    return _response(status, message, code, param, headers)


def _response(
    status: int, message: str, code: str | None, param: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status, dict(headers or {}))


def install_handlers(app: FastAPI) -> None:
    """Have every error of an app answered in OpenAI's format."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _response(error.status_code, str(error.detail), None, None, error.headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        param, message = explain(error.errors(), error.body)
        return _response(400, message, "invalid_value", param)

    for kind in (KVEraserError, Exception):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
