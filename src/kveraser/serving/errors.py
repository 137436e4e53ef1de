"""Every error as a client is told of it.

Knows: HTTP statuses, our errors, and that paths have forms of their own for them (`error_forms`). Does not know about models or requests' meaning. Never logs what a client sent.
"""

from __future__ import annotations

import logging
import traceback
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
from kveraser.serving.error_forms import Problem, written
from kveraser.serving.invalid import explain

log = logging.getLogger("kveraser.serving")

_NO_RETRY = {
    "x-should-retry": "false"
}  # OpenAI's clients try again by themselves unless they are told that it is of no use


def describe(error: BaseException) -> Problem:
    """What an error is to a client."""
    if isinstance(error, ApiError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return Problem(error.status, str(error), error.code, error.param, headers)
    if isinstance(error, QueueFullError):
        return Problem(429, str(error), "queue_full", None, {"Retry-After": str(error.retry_after)})
    if isinstance(error, JobTimeoutError):
        return Problem(408, str(error), "timeout", None, _NO_RETRY)
    if isinstance(error, JobCancelledError):
        return Problem(503, str(error), "stopping", None, {"Retry-After": "5"})
    if isinstance(error, ContextLengthError):
        return Problem(400, str(error), "context_length_exceeded", error.param, {})
    if isinstance(error, RecursionError):  # ours end; what a client nests may not
        return Problem(400, "the request is nested too deeply", "invalid_value", None, {})
    if isinstance(error, SessionNotFoundError):
        return Problem(404, str(error), "session_not_found", None, {})
    if isinstance(error, KVEraserError):
        # A file name is the server's business alone.
        text = "the session cannot be read from disk" if isinstance(error, SessionFileError) else str(error)
        return Problem(400, text, type(error).__name__, None, {})
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f"{Path(place[0].filename).name}:{place[0].lineno}" if place else "?"
    log.error("unexpected %s at %s", type(error).__name__, where)  # not its text: it may quote a prompt
    return Problem(500, "the server made a mistake; its log says where", "internal_error", None, _NO_RETRY)


def error_response(error: BaseException, path: str = "") -> JSONResponse:
    """An error as a response to a request for a path."""
    return _response(describe(error), path)


def _response(problem: Problem, path: str) -> JSONResponse:
    sent = written(problem, path)
    return JSONResponse(sent.body, sent.status, sent.headers)


def install_handlers(app: FastAPI) -> None:
    """Have every error of an app answered in the form that its path has."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.url.path)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        problem = Problem(error.status_code, str(error.detail), headers=error.headers or {})
        return _response(problem, request.url.path)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        param, message = explain(error.errors(), error.body)
        return _response(Problem(400, message, "invalid_value", param), request.url.path)

    for kind in (KVEraserError, Exception):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
