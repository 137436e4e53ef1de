"""The vLLM servers behind the proxy: which ones answer, how busy they are, HTTP to them.

Knows: addresses, HTTP (httpx). Does not know what is asked, or which conversations they have.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from kveraser.errors import EngineError, OptionError

COOLDOWN = 5.0
"""Seconds for which a server that failed is asked only when no other one is left."""
_CONNECT_SECONDS = 5.0
_KEEP_SECONDS = 2.0  # for which a connection is kept; vLLM's side closes it after 5
_AT_ONCE = 1.0  # seconds in which a connection that was idle too long fails
_CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        number: of the server, from 0, in the order in which they were given.
        in_flight: requests that it is answering.
        down_until: by `time.monotonic()`; it failed and is left alone until then.
        max_tokens: of a prompt and its reply; 0 while not known.
        models: whose conversations can be edited: no adapters; none while not known.
        refreshing: held while it prefills something in the background.
    """

    number: int
    url: str
    in_flight: int = 0
    down_until: float = 0.0
    max_tokens: int = 0
    models: frozenset[str] = frozenset()
    refreshing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_up(self) -> bool:
        """Whether it is asked like any other."""
        return time.monotonic() >= self.down_until

    def failed(self) -> None:
        """Leave it alone for a while."""
        self.down_until = time.monotonic() + COOLDOWN


class Replicas:
    """All of them.

    Args:
        urls: "http://host:port", with or without "/v1".
        key: what the servers want as API key.
        timeout: seconds without a byte of a reply after which a server has failed.

    Raises:
        OptionError: no address, one twice, or one that is no address of a server.
    """

    def __init__(self, urls: Sequence[str], *, key: str | None, timeout: float) -> None:
        plain = [url.rstrip("/").removesuffix("/v1") for url in urls]
        if not plain:
            raise OptionError("at least one vLLM server is needed: --upstream http://127.0.0.1:8001")
        for url in plain:
            if not url.startswith(("http://", "https://")):
                raise OptionError(f"a server's address begins with http:// or https://, got {url!r}")
            if plain.count(url) > 1:
                raise OptionError(f"{url} is given {plain.count(url)} times")
        self.all = [Replica(number, url) for number, url in enumerate(plain)]
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_SECONDS)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS, pool=None), limits=limits, trust_env=False
        )

    def order(self, first: Replica | None = None) -> list[Replica]:
        """The servers in the order in which they are to be tried.

        Args:
            first: goes before the others, if it is up. These go by how busy they are; those that failed are the last ones.
        """
        return sorted(self.all, key=lambda each: (not each.is_up, each is not first, each.in_flight, each.number))

    async def send(
        self, replica: Replica, method: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> httpx.Response:
        """A response whose body has not been read yet; it is to be closed.

        Sent again, once, where a connection that had been kept is closed at once: the server may have done so because it was idle. Never
        where the connection was made for this request, or where the server may have worked on it: the request may be what it fails on.

        Raises:
            httpx.HTTPError: there is none.
        """
        kept = True

        async def trace(event: str, _: object) -> None:
            nonlocal kept
            kept = kept and not event.startswith("connection.connect")

        request = self._client.build_request(
            method,
            replica.url + path,
            headers=httpx.Headers({**headers, **self._headers}, encoding="latin-1"),  # as they came: it has every byte
            content=content,
            extensions={"trace": trace},
        )
        begun = time.monotonic()
        try:
            return await self._client.send(request, stream=True)
        except _CLOSED:
            if not kept or time.monotonic() - begun > _AT_ONCE:
                raise
            return await self._client.send(request, stream=True)

    async def json(self, replica: Replica, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a server answers.

        Raises:
            EngineError: it cannot be reached (and is left alone for a while), or refuses.
        """
        method, content = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        try:
            response = await self.send(replica, method, path, {"content-type": "application/json"}, content)
            try:
                text = await response.aread()
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            replica.failed()
            raise EngineError(f"{replica.url}{path} cannot be reached: {type(error).__name__}") from error
        if response.status_code != 200:
            raise EngineError(f"{replica.url}{path} answered {response.status_code}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise EngineError(f"{replica.url}{path} answered no JSON") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
