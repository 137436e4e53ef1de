"""The contexts of all API keys: in memory within a budget, the others on disk.

Knows: held contexts, the state folder. Does not know about HTTP, queues or decoding. For one thread (the worker's).

The least recently used contexts go to disk. A cached conversation is only a cache: on disk, too, the oldest are dropped
when their budget is full, and none is written before it has to make room (or the server stops). A session is never dropped;
it is on disk before a change to it is acknowledged.
"""

from __future__ import annotations

import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.context import ErasableContext
from kveraser.eraser import KVEraser
from kveraser.errors import NotYetError, SessionFileError
from kveraser.serving.contexts.blocks import Ids
from kveraser.serving.contexts.cards import StoredContext
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.state_dir import StateDir, temporary_state_dir

log = logging.getLogger("kveraser.serving")

DISK_TIMES = 4
"""Cached conversations on disk may take this many times the memory budget."""
MOST_HELD = 1024
"""Contexts that stay in memory, however small: an empty session has no keys and values, and takes memory all the same."""


@dataclass(frozen=True)
class Candidate:
    """A cached conversation that a request may use, in memory or on disk; `exact_until`: how many of its ids, from the
    beginning, equal a fresh prefill (of one on disk: at most); `busy`: whether a reply is being made in it."""

    id: str
    ids: Ids
    exact_until: int
    busy: bool = False


@dataclass(frozen=True)
class StoreNumbers:
    """A store at one moment: bytes of keys and values in memory and their budget, contexts in memory and on disk only."""

    bytes: int
    budget: int
    in_memory: int
    on_disk: int


class ContextStore:
    """Contexts by id; every look-up names the owner, and finds nothing of anybody else's.

    Args:
        budget: bytes of keys and values in memory.
        folder: where contexts are kept on disk; None takes a temporary folder that is removed at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eraser: KVEraser | None,
        *,
        budget: int,
        folder: Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.eraser = model, tokenizer, eraser
        self.budget = budget
        self._is_temporary = folder is None
        self._disk = temporary_state_dir() if folder is None else StateDir(folder)
        self._held: OrderedDict[str, HeldContext] = OrderedDict()
        self._stored: OrderedDict[str, StoredContext] = OrderedDict((row.id, row) for row in self._disk)
        self._left: dict[str, StoredContext] = {}  # let go of, and not removed: not yet, or the disk refused it

    # -- finding -------------------------------------------------------------------------------------------------

    def new(self, owner: str, *, is_session: bool) -> HeldContext:
        """A new empty context; a cached conversation is held from now on, a session once it is saved."""
        context = ErasableContext(self.model, self.tokenizer, self.eraser)
        held = HeldContext(uuid.uuid4().hex, owner, is_session, context)
        self._held[held.id] = held
        return held

    def candidates(self, owner: str) -> Iterator[Candidate]:
        """The owner's cached conversations, the most recently used first."""
        for held in reversed(list(self._held.values())):
            if held.owner == owner and not held.is_session:
                yield Candidate(held.id, held.view.ids, held.exact_until, held.busy)
        for row in reversed(list(self._stored.values())):
            if row.owner == owner and not row.is_session and row.id not in self._held:
                yield Candidate(row.id, row.ids, len(row.ids))

    def get(self, owner: str, name: str, *, is_session: bool) -> HeldContext | None:
        """The owner's context with that id, loaded when it is on disk; None when there is none (or it is damaged)."""
        held = self._held.get(name)
        if held is None:
            row = self._stored.get(name)
            if row is None or row.owner != owner or row.is_session != is_session:
                return None
            held = self._load(row)
        if held is None or held.owner != owner or held.is_session != is_session:
            return None
        self._held.move_to_end(name)
        return held

    def sessions(self, owner: str) -> list[str]:
        """Ids of the owner's sessions, sorted."""
        held = {held.id for held in self._held.values() if held.is_session and held.owner == owner}
        return sorted(held | {row.id for row in self._stored.values() if row.is_session and row.owner == owner})

    def conversations(self, owner: str) -> list[HeldContext]:
        """The owner's cached conversations that are in memory."""
        return [held for held in self._held.values() if held.owner == owner and not held.is_session]

    def let_go(self, owner: str, which: Callable[[StoredContext], bool]) -> list[StoredContext]:
        """Let go of those of the owner's cached conversations on disk that are meant: no request finds them any more. They are to be destroyed
        then; those that could not be removed before are among them."""
        known = [*self._stored.values(), *self._left.values()]
        rows = [row for row in known if row.owner == owner and not row.is_session and which(row)]
        for row in rows:
            self._stored.pop(row.id, None)
            self._left[row.id] = row
        return rows

    def destroy(self, rows: Sequence[StoredContext]) -> Iterator[None]:
        """Destroy what was let go of, one folder after the other; other work may be done between them.

        Raises:
            OSError: the disk refuses; what is left is known still.
        """
        for row in rows:
            if self._left.get(row.id) is row:  # else there is something else of that name by now
                self._disk.remove(row.id)
                del self._left[row.id]
            yield

    def to_repair(self) -> HeldContext | None:
        """The most recently used context that waits to be made exact."""
        return next((held for held in reversed(self._held.values()) if held.repair and not held.exact), None)

    def numbers(self) -> StoreNumbers:
        """What can be counted of it, as it is now."""
        return StoreNumbers(self.bytes, self.budget, *self.count)

    @property
    def bytes(self) -> int:
        """Memory taken by keys and values."""
        return sum(held.bytes for held in self._held.values())

    @property
    def count(self) -> tuple[int, int]:
        """How many contexts are in memory, and how many on disk only."""
        return len(self._held), sum(name not in self._held for name in self._stored)

    # -- keeping -------------------------------------------------------------------------------------------------

    def save(self, held: HeldContext) -> None:
        """Write a context to disk; when this returns, it survives the end of the process."""
        ids = np.empty(0, dtype=np.int64) if held.is_session else held.view.ids
        row = StoredContext(
            held.id, held.owner, held.is_session, ids, held.prompt_end, held.residual, bool(held.context.erased)
        )
        self._stored[held.id] = self._disk.write(row, held.context.save)
        self._left.pop(held.id, None)
        self._stored.move_to_end(held.id)

    def copy(self, held: HeldContext, length: int) -> HeldContext:
        """A second cached conversation that begins with the first `length` tokens of another, which stays."""
        branch = self.new(held.owner, is_session=False)
        branch.context = held.context.prefix(length)
        return branch

    def drop(self, held: HeldContext) -> None:
        """Let go of a context in memory as it is; what is on disk stays."""
        self._held.pop(held.id, None)

    def delete(self, owner: str, name: str, *, is_session: bool) -> bool:
        """Let go of the owner's context with that id, also on disk, whether it can be read or not; whether there was one."""
        known = self._held.get(name) or self._stored.get(name)
        if known is None or known.owner != owner or known.is_session != is_session:
            return False
        self.forget(known)
        return True

    def forget(self, held: HeldContext | StoredContext) -> None:
        """Let go of a context, also on disk."""
        self._held.pop(held.id, None)
        row = self._stored.get(held.id)
        if row is not None and not held.is_session:
            self._drop_stored(row)
        elif row is not None:
            self._disk.remove(held.id)  # its owner shall hear of it where this fails
            del self._stored[held.id]

    def make_room(self, extra: int = 0, keep: HeldContext | None = None) -> None:
        """Let go of things until `extra` more bytes fit into the budget: of what undoes erases, the oldest first, then of the
        least recently used contexts, but not of `keep` or busy ones, which go to disk. So do those that are too many.

        Raises:
            NotYetError: more are wanted, and there will be room for them once busy contexts are so no more.
        """
        sizes = {held.id: held.bytes for held in self._held.values()}  # measured once: that looks at every layer

        def spoken_for(held: HeldContext) -> int:
            return max(sizes[held.id], held.reserved)

        free = self.budget - extra - sum(map(spoken_for, self._held.values()))
        for held in list(self._held.values()):
            while free < 0 and (freed := held.drop_oldest_undo()) is not None:
                before = spoken_for(held)
                sizes[held.id] -= freed
                free += before - spoken_for(held)
        for held in list(self._held.values()):
            if free >= 0 and len(self._held) <= MOST_HELD:
                return
            if held is not keep and not held.busy:
                free += spoken_for(held)
                self._spill(held)
        if extra and free < 0 and any(held.busy for held in self._held.values()):
            raise NotYetError("replies that are being made take up the memory; this waits until one of them is done")

    def close(self) -> None:
        """Write what is in memory to disk, and let go of the folder."""
        for held in list(self._held.values()):
            self._spill(held)
        for row in self._left.values():  # else the next start would find them again
            with suppress(OSError):
                self._disk.remove(row.id)
        if self._is_temporary:
            self._disk.discard()
        else:
            self._disk.close()

    def _spill(self, held: HeldContext) -> None:
        del self._held[held.id]
        if not held.is_session and len(held.context):  # a session was saved when it was changed
            try:
                self.save(held)
            except OSError as error:  # a full disk, say: it is only a cache
                log.warning("a cached conversation was dropped: %s", type(error).__name__)
                self._stored.pop(held.id, None)
        kept = [row for row in self._stored.values() if not row.is_session]
        while kept and sum(row.bytes for row in kept) > DISK_TIMES * self.budget:
            oldest = kept.pop(0)
            self._drop_stored(oldest)

    def _drop_stored(self, row: StoredContext) -> None:
        """Let go of a cached conversation on disk; where the disk refuses, no request is to suffer from it."""
        del self._stored[row.id]
        try:
            self._disk.remove(row.id)
        except OSError as error:
            log.warning("a cached conversation stays on disk until the next start: %s", type(error).__name__)
            self._left[row.id] = row

    def _load(self, row: StoredContext) -> HeldContext | None:
        folder = self._disk.path(row.id)
        self.make_room(row.bytes)
        try:
            context = ErasableContext.load(folder, self.model, self.tokenizer, self.eraser)
        except SessionFileError:
            if row.is_session:  # the owner shall hear of it, and the files shall stay
                raise
            self._drop_stored(row)
            return None
        held = HeldContext(row.id, row.owner, row.is_session, context, row.prompt_end, residual=row.residual)
        if not row.is_session and not np.array_equal(held.view.ids, row.ids):  # of a version that showed other ids
            self._drop_stored(row)
            return None
        if not row.is_session:  # only one of the two is kept, so that they cannot differ
            self._drop_stored(row)
        self._held[row.id] = held
        return held
