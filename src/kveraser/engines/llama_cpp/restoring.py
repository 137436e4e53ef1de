"""Undoing an erase: by the cells its receipt kept, or by recomputing.

Knows: receipts, marks, kept cells. Does not know how erases are made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from kveraser.cache import EditMark, Marks
from kveraser.context import RestoreReport
from kveraser.engines.llama_cpp import passes
from kveraser.engines.llama_cpp.cells import LIVE
from kveraser.engines.llama_cpp.kept import KeptCells
from kveraser.engines.llama_cpp.state import EditRecord, LlamaCppReceipt, LlamaCppState
from kveraser.errors import RestoreError
from kveraser.interrupts import uninterrupted
from kveraser.spans import Span, SpanLedger


class Restoring(LlamaCppState):
    """`restore`."""

    def restore(self, receipt: LlamaCppReceipt) -> RestoreReport:
        """Undo an erase.

        Bit-exact while nothing was appended since, for the newest edit, and for an older steering edit when the later ones
        are steering edits behind all that it wrote. Otherwise what is needed is recomputed; the report says so.

        Raises:
            RestoreError: a receipt of another context, or restored before. Nothing is changed.
        """
        with self._lock:
            started = time.perf_counter()
            record = self._record(receipt)
            kept = receipt.kept
            after = self._length_after(receipt)
            if kept is None or after is None:
                count = self._restore_by_recomputing(record)
                return RestoreReport(False, self.exact, count, time.perf_counter() - started)
            later = self._later(receipt)
            tail = [] if later or after == self._slots else self._ids_of_slots(Span(after, self._slots))
            layout_from = self._slots if later else kept.layout_from
            safe = KeptCells.take(self._cells, self._slots, layout_from, kept.in_place, self._marks)
            try:
                if later:
                    kept.put_back_in_place(self._cells)
                else:
                    kept.put_back(self._cells)
                    if tail:
                        self._cells.run(tail, kept.length, LIVE)
            except BaseException:
                with uninterrupted():
                    safe.put_back(self._cells)
                raise
            with uninterrupted():
                self._marks = self._marks_without(receipt, kept, bool(tail))
                self._unmark(record)
            return RestoreReport(not tail, self.exact, len(tail), time.perf_counter() - started)

    def _later(self, receipt: LlamaCppReceipt) -> list[str]:
        ids = [edit.id for edit in self._marks.edits]
        return ids[ids.index(receipt.id) + 1 :]

    def _length_after(self, receipt: LlamaCppReceipt) -> int | None:
        """How many slots there were right after the edit, when its kept cells can be put back; else None."""
        edits = self._marks.edits
        index = next((i for i, edit in enumerate(edits) if edit.id == receipt.id), None)
        if index is None or receipt.kept is None:
            return None
        edit, later = edits[index], edits[index + 1 :]
        if self._slots < edit.length_after:
            return None
        if later:
            if not (edit.in_place and all(other.in_place for other in later)) or self._slots != edit.length_after:
                return None
            if _outdated(receipt.kept, later):
                return None
        return edit.length_after

    def _marks_without(self, receipt: LlamaCppReceipt, kept: KeptCells, appended: bool) -> Marks:
        if not self._later(receipt):
            known = {edit.id for edit in self._marks.edits}
            return kept.marks.without_edits({edit.id for edit in kept.marks.edits} - known)
        steered = tuple(entry for entry in self._marks.steered if entry.span not in receipt.steered)
        return replace(self._marks, steered=steered).without_edits({receipt.id})

    def _unmark(self, record: EditRecord) -> None:
        for span in record.erased:
            self._ledger.unmark(span)
        self._ledger.set_in_cache(record.dropped, True)
        self._records.pop(record.receipt.id)

    def _restore_by_recomputing(self, record: EditRecord) -> int:
        """Bring a span back from its ids: everything from it on is recomputed exactly; returns the number of tokens."""
        ledger: SpanLedger = self._ledger.copy()
        for span in record.erased:
            ledger.unmark(span)
        ledger.set_in_cache(record.dropped, True)
        slot = ledger.to_cache(record.receipt.spans[0].start)
        start = min(slot, self._slots if self._marks.approximate_from is None else self._marks.approximate_from)
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._live_ids(ledger)[start:]
        if start + len(ids) > self._cells.length:
            raise RestoreError(
                f"the context with {record.receipt.span} in it would have {start + len(ids)} tokens, and has room for "
                f"{self._cells.length}; erase something else first"
            )
        safe = KeptCells.take(self._cells, self._slots, start, (), self._marks)
        try:
            passes.recompute(self._cells, ids, start, self._slots)
        except BaseException:
            with uninterrupted():
                safe.put_back(self._cells)
            raise
        with uninterrupted():
            self._records.pop(record.receipt.id)
            self._marks, self._ledger = Marks(), ledger
            for entry in self._records.values():
                entry.dropped = ()
        return len(ids)


def _outdated(kept: KeptCells, later: Sequence[EditMark]) -> bool:
    """Whether later edits, all in place, make kept cells unfit to be put back.

    An edit writes nothing before what it erases, and no cell has read what is behind it. So cells before all that later
    edits wrote are as good as ever; any other may have been written by them, or have read what they erased.
    """
    written = [span.start for edit in later for span in edit.written]
    return bool(written) and any(span.end > min(written) for span in kept.in_place)
