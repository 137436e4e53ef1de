"""What stands around an application: keys, limits of a request, names of the server, errors, counts.

Knows: how these are put around any application. Does not know what it serves.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Depends, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kveraser.serving.access import BodyLimit, Keys, SameOrigin, owner_of
from kveraser.serving.errors import error_response, install_handlers


def guard(
    app: FastAPI,
    registry: CollectorRegistry,
    *,
    api_keys: Sequence[str],
    body_limit: int,
    body_seconds: float,
    hosts: Sequence[str],
) -> None:
    """Put it around an application, which also shows its metrics from then on.

    Args:
        registry: of its metrics; its requests are counted there.
        api_keys: keys that are let in; none lets everybody in, but no pages of other sites.
        body_limit: bytes of the longest request.
        body_seconds: in which a request has to be there as a whole.
        hosts: names by which browsers may call the server; none allows all.

    Raises:
        OptionError: a key that is empty, or that no client could send.
    """
    app.state.keys = Keys(api_keys)
    install_handlers(app)
    requests = Counter("kveraser_requests", "Requests by path and status.", ("path", "status"), registry=registry)

    @app.get("/metrics", tags=["operation"], dependencies=[Depends(owner_of)], response_class=Response)
    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(CountRequests, requests=requests)
    app.add_middleware(BodyLimit, limit=body_limit, seconds=body_seconds)
    if not api_keys:
        app.add_middleware(SameOrigin)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)


class CountRequests:
    """Counts requests by route (`path`) and `status`, the labels of `requests`. What no handler expected is answered here, so
    that no traceback with a prompt in it reaches a log."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            response = error_response(error, scope["path"])
            if not status:
                await response(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # the pattern: a path itself may name a session
            self.requests.labels(path, str(status)).inc()
