"""Messages in a context, and finding what is meant by a span, an id or a text: wherever the tokens are.

Knows: the conversation, spans. Does not know about caches, models or servers.
"""

from __future__ import annotations

import threading
from typing import Any

from kveraser.context.messages import Conversation
from kveraser.context.text import located
from kveraser.spans import Span


class Talking:
    """What contexts have in common that hold chat messages: one of an engine in this process, or one on a server."""

    _chat: Conversation
    _lock: threading.RLock

    def append_message(self, role: str, content: str, *, id: str | None = None) -> Span:
        """Put one chat message behind the context; returns the span of its content alone (the template's markup stays out of it).

        Args:
            id: a name by which the message can be erased.

        Raises:
            ContextError: no content, an id that is taken, no chat template, or one that is not prefix-stable.
        """
        with self._lock:
            message = self._chat.new(role, content, id)
            ids, inside = self._chat.ids_of(self._require_tokenizer(), message)
            return self._chat.enter(message, inside.shift(self._grow(ids).start))

    def locate(self, what: Span | str) -> Span:
        """The ledger span meant by a span, a message id, or a text that occurs once.

        Raises:
            SpanError: neither a message id nor a text in the context, or a text that occurs more than once.
        """
        return located(what, self._chat.named, self._find)

    def _require_tokenizer(self) -> Any:
        raise NotImplementedError

    def _grow(self, ids: list[int]) -> Span:
        """Put ids behind the context."""
        raise NotImplementedError

    def _find(self, text: str) -> Span:
        """The span of a text that occurs once."""
        raise NotImplementedError
