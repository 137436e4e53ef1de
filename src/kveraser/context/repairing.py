"""Making a context exact again, beside the cache that goes on being used; and making an erase final.

Knows: recomputing from the ledger. Does not know how the erases were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kveraser.context.state import PURGED, ContextState, Repair
from kveraser.errors import OptionError, RestoreError
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseReceipt
from kveraser.spans import Span


@dataclass(frozen=True)
class RepairProgress:
    """How far a repair is, in tokens."""

    done: int
    total: int

    @property
    def finished(self) -> bool:
        """Whether the context is exact now."""
        return self.done >= self.total


class Repairing(ContextState):
    """`repair` and `purge`."""

    @torch.no_grad()
    def repair(
        self,
        *,
        chunk: int | None = None,
        max_chunks: int | None = None,
        progress: Callable[[RepairProgress], None] | None = None,
    ) -> RepairProgress:
        """Recompute exactly what approximate erases left, beside the cache, and swap when done.

        The context can be used between calls with `max_chunks`; appended tokens are taken along, another erase or
        restore starts the repair over. Ends bit-equal to `full-recompute` with the same chunks.

        Args:
            chunk: tokens per forward; None for as many as pay where the model is.
            max_chunks: forwards to run now; None runs to the end.
            progress: called after every chunk.

        Raises:
            OptionError: an impossible chunk; nothing was changed.
        """
        if chunk is not None and chunk < 1:
            raise OptionError(f"chunk={chunk} must be at least 1 token; None for as many as pay where the model is")
        with self._lock:
            return self._repair_now(chunk, max_chunks, progress)

    def _repair_now(
        self,
        chunk: int | None = None,
        max_chunks: int | None = None,
        progress: Callable[[RepairProgress], None] | None = None,
        wipe: bool = False,
    ) -> RepairProgress:
        backend, marks = self.backend, self.backend.marks
        if marks.exact:
            return RepairProgress(0, 0)
        chunk = chunk or backend.chunk
        ledger = self._ledger.copy()
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._slot_ids(ledger)
        if self._repair is None or self._repair.chunk != chunk:
            start = marks.approximate_from or 0
            beside = backend.fresh()
            if start:
                beside.put(Span(0, start), backend.take(Span(0, start)))
            self._repair = Repair(beside, start, chunk)
        work, beside = self._repair, self._repair.beside
        state = RepairProgress(beside.length - work.start, len(ids) - work.start)
        while not state.finished and (max_chunks is None or max_chunks > 0):
            end = min(beside.length + chunk, len(ids))
            beside.extend(self._tokens_of(ids[:end]), chunk)
            max_chunks = None if max_chunks is None else max_chunks - 1
            state = RepairProgress(beside.length - work.start, len(ids) - work.start)
            if progress:
                progress(state)
        if state.finished:
            with uninterrupted():
                backend.take_over(beside, wipe=wipe)
                self._became_exact(ledger)
        return state

    def purge(self, receipt: EraseReceipt) -> None:
        """Make an erase final: repair exactly, then leave no id and no state of the span anywhere in this object.

        States kept for undoing *any* edit are freed, since they may have seen the span; those edits can still be
        restored by recomputing. The span's ledger positions stay, its ids are gone. An erase can be purged at any time, also one
        that was saved and loaded; where files could not be written, purging it again goes on with them.

        Raises:
            RestoreError: a receipt of another context, restored before, or purged before.
            SessionFileError: another context has saved to a folder of this one since. Nothing was changed.
            OSError: a folder could not be written; in memory nothing is left of the span.
        """
        with self._lock:
            known = self._records.get(getattr(receipt, "id", ""))
            if known is not None and known.purged and self._forget_files():
                return
            record = self._record(receipt)
            if not record.receipt.tokens_removed:
                raise RestoreError(f"the {record.receipt.method} edit of {record.receipt.span} erased nothing to purge")
            self._check_forget()
            self._repair_now(wipe=True)
            with uninterrupted():
                for entry in self._records.values():
                    if (undo := entry.undo()) is not None:
                        undo.clear()
                for span in record.erased:
                    self._ids.view[span.slice] = PURGED
                self.backend.wipe_spare()
                record.purged = True
                self._became_exact(self._ledger)
                self._forget(record.erased)
            self._forget_files()

    def _check_forget(self) -> None:
        """Hook: raise unless everything that is known of spans can be dropped."""

    def _forget(self, spans: tuple[Span, ...]) -> None:
        """Hook: drop what else is known of purged spans."""

    def _forget_files(self) -> bool:
        """Hook: make what was written of purged spans unreadable; whether there was any left."""
        return False
