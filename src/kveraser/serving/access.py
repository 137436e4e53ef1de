"""Who asks: API keys, other sites' pages, and the limits of a request.

Knows: headers, digests, sizes. Does not know about models or sessions. Keys are compared in constant time and are neither
stored nor logged; an owner is the digest of a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kveraser.errors import ApiError
from kveraser.serving.errors import error_response
from kveraser.serving.exposure import check_keys

_READING = ("GET", "HEAD", "OPTIONS")

ANYBODY = ""
"""The owner of everything where no keys are set."""


class Keys:
    """The keys that are let in; none lets everybody in.

    Raises:
        OptionError: an empty key, or one that no client could send.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def owner(self, request: Request) -> str:
        """The owner that a request's key stands for.

        Raises:
            ApiError: 401, no key or a wrong one.
        """
        if not self._digests:
            return ANYBODY
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = [token if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
        digests = [hashlib.sha256(key.strip().encode("utf-8", "replace")).digest() for key in given]
        known = [digest for digest in digests if self._is_known(digest)]
        if not known:
            text = "a valid API key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY"
            raise ApiError(401, text, code="invalid_api_key")
        return known[0].hex()

    def _is_known(self, digest: bytes) -> bool:
        found = [hmac.compare_digest(digest, each) for each in self._digests]  # all of them: no early exit
        return any(found)


def owner_of(request: Request) -> str:
    """The owner that a request's key stands for, by the keys of its application."""
    keys: Keys = request.app.state.keys
    return keys.owner(request)


Owner = Annotated[str, Depends(owner_of)]
"""A route's parameter: the owner. A route that has it lets nobody in without a key."""


class SameOrigin:
    """Refuses what a page of another site has a browser send, unless it only reads (which it cannot see the answer of).

    For servers without keys: a key is nothing that a browser sends by itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _READING and _is_foreign(Headers(scope=scope)):
            text = "a page of another site cannot use a server without API keys"
            await error_response(ApiError(403, text, code="cross_site_request"), scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sends this."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


class BodyLimit:
    """Refuses requests whose body is longer than `limit` bytes, whatever their headers say, or takes longer than `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        text = f"the request is longer than {self.limit} bytes"
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await error_response(ApiError(413, text, code="request_too_large"), scope["path"])(scope, receive, send)
            return
        read, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal read, complete
            if complete:  # what comes now is only that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body was not complete after {self.seconds:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, text)
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)
