"""Sessions on the servers: from what a request leaves out of a conversation to an edited context, and the prompt for it.

Knows: `VLLMSession`, uses, views; runs sessions in threads, since they wait for servers. Does not know about HTTP requests to the
proxy, or which conversation is used.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kveraser.engines.vllm.client import VLLMReceipt, VLLMSession
from kveraser.engines.vllm.proxy.comparing import Ids, Use
from kveraser.engines.vllm.proxy.conversations import fresh_view
from kveraser.errors import KVEraserError
from kveraser.serving.beside import Beside
from kveraser.serving.contexts.finding import message_starts
from kveraser.serving.contexts.view import View

_THREADS = 8
_IDLE = 16  # sessions for each server that wait for the next conversation


@dataclass(frozen=True)
class Edited:
    """An edited context, as far as a request goes on with it.

    Attributes:
        session: that has it.
        view: the ids that it holds, as the client sends them.
        receipt: of the erase; None where nothing was erased.
    """

    session: VLLMSession
    view: View
    receipt: VLLMReceipt | None


class Sessions:
    """Sessions on all servers; an idle one is used again, since opening one takes a few requests.

    Args:
        key, timeout: of the servers.
        tokenizer: the model's; None has it loaded from where the first server says the model is.
        readers: how many readers of a span are computed again, where no trained eraser has a number of its own; None: by its length.
    """

    def __init__(
        self,
        key: str | None,
        timeout: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        readers: int | None = None,
    ) -> None:
        self._key, self._timeout, self._tokenizer, self._readers = key, timeout, tokenizer, readers
        self._beside = Beside(None, _THREADS, "kveraser-sessions")
        self.run = self._beside.run
        self._idle: dict[tuple[str, str], list[VLLMSession]] = {}
        self._places: dict[int, tuple[str, str]] = {}
        self._lock = Lock()
        self.starts: frozenset[int] = frozenset()
        """Ids that begin a message, once a server has been seen."""

    def open(self, url: str, model: str) -> VLLMSession:
        """An empty session on a server. In a thread of `run`, as all that follows.

        Raises:
            EngineError: nothing can be erased there.
        """
        place = (url, model)
        with self._lock:
            if waiting := self._idle.get(place):
                return waiting.pop()
        session = VLLMSession(url, model=model, tokenizer=self._tokenizer, api_key=self._key, timeout=self._timeout)
        session.repair = self._readers if session.repair is None else session.repair
        with self._lock:
            if self._tokenizer is None or not self.starts:
                self._tokenizer = session.tokenizer
                self.starts = message_starts(session.tokenizer)
            self._places[id(session)] = place
        return session

    def close(self, session: VLLMSession, *, tell: bool = True) -> None:
        """Drop a session's edited context; the session can be used again.

        Args:
            tell: the server, too. Without, it drops the context itself when it needs the room.
        """
        with self._lock:
            place = self._places[id(session)]
            waiting = self._idle.setdefault(place, [])
            keep = tell and len(waiting) < _IDLE
        if tell:
            try:
                session.close()
            except KVEraserError:  # the server has gone: nothing to tell it
                keep = False
        with self._lock:
            if keep:
                waiting.append(session)
            else:
                self._places.pop(id(session), None)

    def dispose(self, session: VLLMSession, *, tell: bool = True) -> None:
        """Close a session, without waiting for it."""
        with suppress(RuntimeError):  # stopped
            self._beside.threads.submit(self.close, session, tell=tell)

    def stop(self) -> None:
        """Finish what is begun, and take nothing more."""
        self._beside.threads.shutdown(wait=True)

    # -- edits -------------------------------------------------------------------------------------------------------

    def edit(self, url: str, model: str, view: View, found: Use) -> Edited:
        """An edited context made of what a server has read exactly.

        Args:
            view: what it has read.
            found: what of it is to stay.

        Raises:
            EngineError, SpanError: it cannot be done.
        """
        session = self.open(url, model)
        kept = found.kept_until
        try:
            session.append(view.ids[:kept].tolist())
            return self.edit_more(session, fresh_view(view.ids[:kept]), found)
        except BaseException:
            self.close(session)
            raise

    def edit_more(self, session: VLLMSession, view: View, found: Use) -> Edited:
        """Take more out of what a session holds; nothing is asked of the server where only its end is cut off behind an edit.

        Raises:
            EngineError, SpanError: it cannot be done; the session is as it was.
        """
        runs = list(found.removals)
        if found.kept_until < len(view):
            runs.append((found.kept_until, len(view)))
        spans = [span for start, end in runs for span in view.ledger_spans(start, end)]
        if not spans:
            return Edited(session, view, None)
        receipt = session.erase(spans, undo=False)
        stays = np.ones(len(view), dtype=bool)
        for start, end in runs:
            stays[start:end] = False
        return Edited(session, View(view.ids[stays], view.where[stays]), receipt if found.removals else None)

    @staticmethod
    def prompt(session: VLLMSession, new: Ids) -> tuple[list[int], dict[str, Any]] | None:
        """The ids to send for an edited context with new ids behind it, and what is to be added to the body; None when the
        context is not an edited one (any more)."""
        said = session.request(new.tolist())
        return (said["prompt"], said["extra_body"]) if said["extra_body"] else None

    @staticmethod
    def go_on(session: VLLMSession, view: View, wanted: Ids) -> View:
        """Put what is new in a request behind what a session holds."""
        new = wanted[len(view) :]
        if not len(new):
            return View(wanted, view.where)
        span = session.append(new.tolist())
        return View(wanted, np.concatenate([view.where, np.arange(span.start, span.end)]))
