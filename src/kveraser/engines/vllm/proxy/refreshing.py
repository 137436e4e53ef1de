"""Edited contexts that are replaced by exactly prefilled ones in the background: the policy `auto`.

Knows: conversations, servers. Does not know how requests are answered.

The server reads the conversation as it is, without what was erased, when it has nothing else to do; its own prefix cache then has it.
The next request is a plain one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kveraser.engines.vllm.proxy.conversations import Conversation, Conversations, fresh_view
from kveraser.engines.vllm.proxy.editing import Sessions
from kveraser.engines.vllm.proxy.replicas import Replicas
from kveraser.errors import EngineError

_LOOK_EVERY = 0.05  # seconds between looks whether a server is idle


class Refresher:
    """Replaces edited contexts.

    Args:
        count: called for each that was replaced.
    """

    def __init__(
        self, conversations: Conversations, sessions: Sessions, replicas: Replicas, count: Callable[[], None]
    ) -> None:
        self._conversations, self._sessions, self._replicas, self._count = conversations, sessions, replicas, count
        self._tasks: dict[asyncio.Task[None], Conversation] = {}

    def ask(self, entry: Conversation) -> None:
        """Have a conversation's edited context replaced, some time."""
        if entry.session is not None and entry not in self._tasks.values():
            task = asyncio.create_task(self._refresh(entry))
            self._tasks[task] = entry
            task.add_done_callback(self._tasks.pop)

    def settle(self, entry: Conversation) -> None:
        """Give the edited context up if there is an exact one and nothing is being answered from it."""
        if entry.session is None or entry.busy or not entry.is_prefilled:
            return
        self._sessions.dispose(entry.session)
        entry.session, entry.prefilled, entry.view = None, None, fresh_view(entry.view.ids)
        self._count()

    async def _refresh(self, entry: Conversation) -> None:
        replica = self._replicas.all[entry.replica]
        async with replica.refreshing:
            while replica.in_flight:
                await asyncio.sleep(_LOOK_EVERY)
            if entry.session is None or entry not in self._conversations:
                return
            ids = entry.view.ids
            body = {"model": entry.owner[1], "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0}
            try:
                await self._replicas.json(replica, "/v1/completions", body)
            except EngineError:  # the context stays edited; the next reply asks again
                return
        entry.prefilled = ids
        self.settle(entry)

    async def stop(self) -> None:
        """Give up what is not done."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
