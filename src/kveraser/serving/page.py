"""The page at `/`, and what it is told before it has a session: examples to read, methods to erase with.

Knows: the files of `web/`, headers that keep a browser to them, the demo's stories. Does not know about sessions.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Response

from kveraser.demo.stories import stories
from kveraser.errors import ApiError
from kveraser.methods import methods
from kveraser.serving.access import owner_of
from kveraser.serving.service import Service

_WEB = Path(__file__).parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Nothing but the server's own files is loaded, nothing inline is run, and no other page may frame this one."""


def page_router(service: Service) -> APIRouter:
    """The routes. The page itself and the examples need no key."""
    router = APIRouter(tags=["page"])
    files = {path.name: path.read_bytes() for path in _WEB.iterdir() if path.suffix in _TYPES}

    def sent(name: str) -> Response:
        media = _TYPES[Path(name).suffix]
        return Response(files[name], media_type=f"{media}; charset=utf-8", headers=HEADERS)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return sent("index.html")

    @router.get("/web/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "the page has no such file")
        return sent(name)

    @router.get("/v1/examples")
    async def examples() -> dict[str, Any]:
        """The demo's stories: contexts in three parts, of which the span is to be erased, and a question."""
        return {"data": [asdict(story) for story in stories()]}

    @router.get("/v1/methods", dependencies=[Depends(owner_of)])
    async def list_methods() -> dict[str, Any]:
        """The erasing methods, and whether they can be used with this model."""
        return {
            "data": [
                {"name": name, "summary": method.summary, "exact": method.exact,
                 "available": service.eraser is not None or not method.needs_eraser}
                for name, method in methods().items()
            ]
        }  # fmt: skip

    return router
