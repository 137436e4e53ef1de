"""The application: which paths there are, keys, limits, health.

Knows: routes. Does not know how a request is answered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from kveraser import __version__
from kveraser.engines.vllm.proxy.front import Front
from kveraser.errors import ApiError
from kveraser.serving.access import Owner, owner_of
from kveraser.serving.guarding import guard

READ = ("/v1/models", "/v1/models/{model:path}", "/version")
"""Paths that are passed on as they are (GET)."""
ASKED = ("/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/embeddings", "/tokenize",
         "/detokenize")  # fmt: skip
"""Paths that are passed on as they are (POST)."""
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True)
class ProxyAppOptions:
    """Who is let in; see `serving.guarding`."""

    api_keys: Sequence[str] = ()
    body_limit: int = 32 << 20
    body_seconds: float = 60.0
    hosts: Sequence[str] = ()


def create_proxy(front: Front, options: ProxyAppOptions) -> FastAPI:
    """The application; it starts and stops the front."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        front.start()
        yield
        await front.stop()

    app = FastAPI(title="kveraser proxy", version=__version__, lifespan=lifespan, openapi_url=None)
    guard(
        app, front.metrics.registry, api_keys=options.api_keys, body_limit=options.body_limit,
        body_seconds=options.body_seconds, hosts=options.hosts,
    )  # fmt: skip

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """How many servers there are, answer, and can edit."""
        servers = front.replicas.all
        up, editing = sum(each.is_up for each in servers), sum(each.max_tokens > 0 for each in servers)
        status = "ok" if up == len(servers) else "degraded" if up else "down"
        return {"status": status, "servers": len(servers), "up": up, "editing": editing, "version": __version__}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, owner: Owner) -> Response:
        """Answer a conversation; what it leaves out of one that was answered before is erased from that."""
        return await front.chat(request, owner)

    async def pass_on(request: Request) -> Response:
        return await front.pass_on(request)

    for paths, method in ((READ, "GET"), (ASKED, "POST")):
        for path in paths:
            app.add_api_route(path, pass_on, methods=[method], response_model=None, dependencies=[Depends(owner_of)])

    @app.api_route("/{path:path}", methods=_METHODS, dependencies=[Depends(owner_of)], response_model=None)
    async def refuse(path: str) -> None:
        """Everything else is the server's own business."""
        raise ApiError(
            404,
            f"/{path[:200]} is not passed on; there are /v1/chat/completions, {', '.join((*READ, *ASKED))}. Ask the vLLM server "
            "itself for anything else",
            code="not_passed_on",
        )

    return app
