"""The application: routes, keys, limits, health and metrics around one service.

Knows: how the parts are put together. Does not know how any of them works.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from kveraser import __version__
from kveraser.serving.anthropic.routes import anthropic_router
from kveraser.serving.chat.rendering import ChatRenderer
from kveraser.serving.guarding import guard
from kveraser.serving.metrics import Metrics
from kveraser.serving.openai.routes import openai_router
from kveraser.serving.page import page_router
from kveraser.serving.service import Service
from kveraser.serving.sessions.routes import session_router


@dataclass(frozen=True)
class AppOptions:
    """How the application answers.

    Attributes:
        model_name: the model's name in requests and replies.
        api_keys: keys that are let in; none lets everybody in.
        body_limit: bytes of the longest request.
        body_seconds: in which a request has to be there as a whole.
        hosts: names by which browsers may call the server; none allows all. Keeps web pages from reaching a server without
            keys on this machine under a name of their own.
    """

    model_name: str
    api_keys: Sequence[str] = ()
    body_limit: int = 8 << 20
    body_seconds: float = 60.0
    hosts: Sequence[str] = ()


def create_app(service: Service, options: AppOptions) -> FastAPI:
    """The application; it closes the service when it stops."""
    metrics, renderer = Metrics(service), ChatRenderer(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="kveraser", version=__version__, lifespan=lifespan, redoc_url=None)
    guard(
        app, metrics.registry, api_keys=options.api_keys, body_limit=options.body_limit, body_seconds=options.body_seconds,
        hosts=options.hosts,
    )  # fmt: skip
    app.include_router(openai_router(service, renderer, options.model_name, metrics, int(time.time())))
    app.include_router(anthropic_router(service, renderer, options.model_name, metrics))
    app.include_router(session_router(service))
    app.include_router(page_router(service))

    @app.get("/healthz", tags=["operation"])
    async def health() -> dict[str, Any]:
        """Whether the server answers."""
        return {"status": "ok", "model": options.model_name, "version": __version__}

    return app
