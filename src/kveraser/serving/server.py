"""Serving an application until it is told to stop, and answering everybody until then.

Knows: uvicorn, the service. Does not know what is served, or what is waiting.

A server that is told to stop waits for the replies that it owes, then cancels them without a word. Ours tells the service first: no
more work is taken up, and what takes longer than the service's grace is told that the server is stopping before that.
"""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI

from kveraser.serving.service import Service

_TO_ANSWER = 10
"""Seconds beyond the service's grace in which the last replies are sent."""


class Server(uvicorn.Server):
    """An HTTP server around a service.

    Args:
        app: what is served; it closes the service when it stops.
        settings: others of uvicorn's.
    """

    def __init__(self, app: FastAPI, service: Service, **settings: Any) -> None:
        grace = int(service.options.grace) + _TO_ANSWER
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **settings))
        self._service = service

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Answer what can be answered in time, and everybody else that the server is stopping."""
        self._service.stop_soon()
        await super().shutdown(*args, **kwargs)
