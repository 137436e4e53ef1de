"""Serving an application until it is told to stop, and answering everybody until then.

Knows: uvicorn. Does not know what is served, or what is waiting.

A server that is told to stop waits for the replies that it owes, then cancels them without a word. Ours first tells whoever makes
the replies, who can take up no more and tell what will not be done in time that the server is stopping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import uvicorn

_TO_ANSWER = 10
"""Seconds beyond the grace in which the last replies are sent."""


class Server(uvicorn.Server):
    """An HTTP server.

    Args:
        app: what is served.
        stop_soon: called when the server is told to stop; does not wait.
        grace: seconds in which all replies will be there after that.
        settings: others of uvicorn's.
    """

    def __init__(
        self, app: Any, stop_soon: Callable[[], None] = lambda: None, grace: float = 20.0, **settings: Any
    ) -> None:
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=int(grace) + _TO_ANSWER, **settings))
        self._stop_soon = stop_soon

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Answer what can be answered in time, and everybody else that the server is stopping."""
        self._stop_soon()
        await super().shutdown(*args, **kwargs)
