"""The sessions of all owners, and changing one; in the worker's thread.

Knows: contexts, the store. Does not know about HTTP or JSON. A change is on disk before it is acknowledged; one that fails,
or cannot be saved, is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kveraser.cache import cache_length
from kveraser.context import ErasableContext, RepairProgress, RestoreReport
from kveraser.errors import RestoreError, SessionNotFoundError
from kveraser.methods import EraseReceipt
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.limits import Limits
from kveraser.serving.contexts.store import ContextStore
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.worker import Job
from kveraser.spans import Span

_MARKUP = 64  # tokens that a chat template may put around a message


class Sessions:
    """Sessions and changes to them; every call names the owner, and finds nothing of anybody else's."""

    def __init__(self, store: ContextStore, limits: Limits) -> None:
        self.store, self.limits = store, limits

    def get(self, owner: str, name: str) -> HeldContext:
        """A session.

        Raises:
            SessionNotFoundError: the owner has none with that id.
        """
        held = self.store.get(owner, name, is_session=True)
        if held is None:
            raise _not_found(name)
        return held

    def names(self, owner: str) -> list[str]:
        """The ids of an owner's sessions."""
        return self.store.sessions(owner)

    def create(self, owner: str) -> HeldContext:
        """A new empty session."""
        held = self.store.new(owner, is_session=True)
        with self.saved(held):
            return held

    def delete(self, owner: str, name: str) -> None:
        """Forget a session and its files, also where these cannot be read any more.

        Raises:
            SessionNotFoundError: the owner has none with that id.
        """
        if not self.store.delete(owner, name, is_session=True):
            raise _not_found(name)

    # -- changing one --------------------------------------------------------------------------------------------

    def append_message(self, owner: str, name: str, role: str, content: str, message_id: str | None) -> Span:
        """Process one chat message; the span of its content."""
        return self._append(owner, name, content, lambda c: c.append_message(role, content, id=message_id))

    def append_text(self, owner: str, name: str, text: str) -> Span:
        """Process text; its span."""
        return self._append(owner, name, text, lambda context: context.append(text))

    def _append(self, owner: str, name: str, text: str, change: Callable[[ErasableContext], Span]) -> Span:
        held = self.get(owner, name)
        self.fit(held, self.count_tokens(held, text))
        with self.saved(held):
            return change(held.context)

    def erase(self, owner: str, name: str, selection: Selection, method: str, *, purge: bool = False) -> EraseReceipt:
        """Take something out; with `purge` for good: repaired exactly, then overwritten everywhere."""
        held = self.get(owner, name)
        self.fit(held, 0)
        spans = selection.spans_in(held.context)
        if not purge:
            return self._edited(held, method, lambda undo: held.context.erase(spans, method, undo=undo))
        with self.saved(held, whole=False):
            receipt = held.context.erase(spans, method, undo=False)
            held.context.purge(receipt)
            held.receipts.clear()
            held.has_copy = False
            return receipt

    def replace(self, owner: str, name: str, selection: Selection, new: str, method: str) -> EraseReceipt:
        """Let something say another text, as if it had always been that."""
        held = self.get(owner, name)
        self.fit(held, self.count_tokens(held, new))
        spans, said = selection.spans_in(held.context), selection.said_instead(held.context, new)
        return self._edited(held, method, lambda undo: held.context.replace(spans, said, method, undo=undo))

    def _edited(self, held: HeldContext, method: str, edit: Callable[[bool], EraseReceipt]) -> EraseReceipt:
        """An edit that can be undone. Undoing a steering edit takes the span's states alone; other methods would keep the whole old
        suffix, and theirs are undone by recomputing."""
        with self.saved(held):
            receipt = edit(method.partition(":")[0] == "kveraser")
            held.receipts[receipt.id] = receipt
            held.has_copy = False
            return receipt

    def restore(self, owner: str, name: str, receipt_id: str) -> RestoreReport:
        """Undo an erase.

        Raises:
            ContextError: there is no room for what it brings back.
        """
        held, found = self._erase_of(owner, name, receipt_id, "undone")
        self.fit(held, _brought_back(held.context, found))
        with self.saved(held):
            report = held.context.restore(found)
            held.receipts.pop(receipt_id, None)
            held.has_copy = False
            return report

    def purge(self, owner: str, name: str, receipt_id: str) -> EraseReceipt:
        """Make an erase final that was made before: repaired exactly, then overwritten everywhere."""
        held, found = self._erase_of(owner, name, receipt_id, "made final")
        with self.saved(held, whole=False):
            held.context.purge(found)
            held.receipts.clear()
            held.has_copy = False
            return found

    def _erase_of(self, owner: str, name: str, receipt_id: str, what: str) -> tuple[HeldContext, EraseReceipt]:
        """A session, and one of its erases; there is room for it to be run again."""
        held = self.get(owner, name)
        self.fit(held, 0)
        found = next((receipt for receipt in held.context.receipts if receipt.id == receipt_id), None)
        if found is None:
            raise RestoreError(f"the session has no erase {receipt_id!r} that can be {what}")
        return held, found

    def repair(
        self,
        owner: str,
        name: str,
        job: Job,
        *,
        chunk: int | None = None,
        emit: Callable[[RepairProgress], None] | None = None,
    ) -> int:
        """Recompute exactly what approximate erases left; the number of tokens. What was done stays when it is cancelled.

        Args:
            chunk: tokens that are run at once; None for as many as pay where the model is.
            emit: called after every chunk.

        Raises:
            ContextError: an exact copy does not fit into the cache budget beside the session.
        """
        held = self.get(owner, name)
        if held.exact:
            return 0
        self.fit(held, 0, copies=2)
        held.has_copy = True
        while not (progress := held.context.repair(chunk=chunk, max_chunks=1, progress=emit)).finished:
            job.check()
        held.has_copy = False
        with self.saved(held):
            return progress.total

    # -- what every change needs ---------------------------------------------------------------------------------

    def count_tokens(self, held: HeldContext, text: str) -> int:
        """Tokens that a text takes, also as a message.

        Raises:
            ContextError: it can never fit, whatever its tokens are.
        """
        self.limits.check_text(text)
        return len(held.context.encode(text)) + _MARKUP

    def fit(self, held: HeldContext, more: int, copies: int = 1) -> None:
        """Make room for `more` tokens, in so many copies of the session, or refuse what can never fit. What adds nothing is not refused:
        it may be what makes a session smaller that is too large, as one is that was made under a larger budget.

        Raises:
            ContextError: it can never fit.
        """
        total = cache_length(held.context.cache) + more
        if more or copies > 1:
            self.limits.check(total, copies=copies)
        self.store.make_room(max(self.limits.bytes_for(total) * copies - held.bytes, 0), keep=held)

    @contextmanager
    def saved(self, held: HeldContext, *, whole: bool = True) -> Iterator[None]:
        """A change that is on disk when the block ends. If that fails, the session is again what is on disk.

        Args:
            whole: whether a change that fails leaves the context as it was by itself.
        """
        try:
            yield
        except BaseException:
            if not whole:
                self.store.drop(held)
            raise
        try:
            self.store.save(held)
        except BaseException:
            self.store.drop(held)
            raise
        self.store.make_room()


def _brought_back(context: ErasableContext, receipt: EraseReceipt) -> int:
    """Slots that a session has more once an edit is undone: put back where they were, or all that is live then read anew."""
    before = cache_length(context.cache)
    live = sum(map(len, context.live_spans)) + sum(map(len, receipt.spans)) - sum(map(len, receipt.replacements))
    return max(sum(map(len, receipt.removed)), live - before, 0)


def _not_found(name: str) -> SessionNotFoundError:
    return SessionNotFoundError(f"there is no session {name!r}")
