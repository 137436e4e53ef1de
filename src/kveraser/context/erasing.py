"""Erasing ledger spans, and undoing it.

Knows: methods, receipts, what can be put back and what has to be recomputed. Does not know about repairing.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kveraser.cache import (
    Tokens,
    cache_length,
    get_marks,
    truncate,
)
from kveraser.context.state import ContextState, EditRecord
from kveraser.edit import run_edit
from kveraser.eraser import KVEraser
from kveraser.errors import RestoreError
from kveraser.ids import IdBuffer
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseMethod, EraseReceipt, as_method, put_back
from kveraser.methods.base import Plan, Undo
from kveraser.spans import Span, SpanLedger, merge_spans


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did.

    Attributes:
        bit_exact: whether every state is the very one from before the erase.
        exact: whether the whole cache now equals a fresh prefill of what is in the context.
        tokens_recomputed: tokens that were run again (those appended since, or everything behind the span).
        seconds: wall-clock time.
    """

    bit_exact: bool
    exact: bool
    tokens_recomputed: int
    seconds: float


class Erasing(ContextState):
    """`erase_spans` and `restore`."""

    def erase_spans(
        self, spans: Span | Iterable[Span], method: str | EraseMethod | KVEraser = "kveraser", *, undo: bool = True
    ) -> EraseReceipt:
        """Erase ledger spans; see `ErasableContext.erase`."""
        with self._lock:
            chosen = as_method(method)
            wanted = merge_spans([spans] if isinstance(spans, Span) else spans, self._ledger.length)
            for span in wanted:
                self._ledger.check_live(span)
            slots = merge_spans((self._ledger.span_to_cache(span) for span in wanted), cache_length(self.cache))
            final: list[EraseReceipt] = []

            def commit(receipt: EraseReceipt) -> None:
                entered = replace(receipt, spans=wanted)
                self._commit(entered, chosen.removes)
                final.append(entered)

            run_edit(self.model, self.cache, Tokens(self._slots.view[None]), slots, chosen, self.eraser, undo, commit)
            return final[0]

    def _commit(self, receipt: EraseReceipt, removes: bool) -> None:
        dropped: tuple[Span, ...] = ()
        if removes:
            slot_of = {span: self._ledger.to_cache(span.start) for span in receipt.spans}
            dropped = self._ledger.drop_slots(receipt.removed)
            for span, slot in slot_of.items():
                self._ledger.mark(span, in_cache=any(slot in steered for steered in receipt.steered))
            self._follow(receipt)
            self._repair = None
        record = EditRecord(replace(receipt, undo=None), dropped)
        if receipt.undo is not None:
            record.undo = weakref.ref(receipt.undo)
        self._records[receipt.id] = record

    def _follow(self, receipt: EraseReceipt) -> None:
        """Keep the slot ids in step with the cache."""
        for span, source in receipt.stand_ins:
            self._slots.view[span.slice] = self._slots.view[source]
        if receipt.removed:
            self._slots = IdBuffer(replace(receipt, stand_ins=()).token_ids(self._slots.view), self._slots.view.device)

    @torch.no_grad()
    def restore(self, receipt: EraseReceipt) -> RestoreReport:
        """Undo an erase.

        Bit-exact while nothing was appended since, for the newest edit and for steering edits in any order. Otherwise
        what is needed is recomputed: the tokens appended since, or everything behind the span; the report says so.

        Raises:
            RestoreError: a receipt of another context, restored before, or made final by `purge`. Nothing is changed.
        """
        with self._lock:
            started = time.perf_counter()
            record = self._record(receipt)
            marks = get_marks(self.cache)
            try:
                after = next(edit.length_after for edit in marks.edits if edit.id == receipt.id)
                undo = record.undo()
                if undo is None:
                    raise RestoreError("its states were freed")
                tail = self._slots.view[after:].clone()
                in_place = Plan(undo.layout_from, tuple(span for span, _ in undo.regions))
                saved = Undo.take(self.cache, in_place, marks)
                put_back(self.cache, replace(receipt, undo=undo))
            except (RestoreError, StopIteration):
                recomputed = self._restore_by_recomputing(record)
                return RestoreReport(False, self.exact, recomputed, time.perf_counter() - started)
            try:
                if len(tail):
                    truncate(self.cache, undo.length)
                    self._extend_cache([*self._ids_of_slots_before(record), *tail.tolist()])
            except BaseException:
                with uninterrupted():
                    saved.put_back(self.cache)
                raise
            with uninterrupted():
                self._unmark(record)
                self._rebuild_slots()
            return RestoreReport(not len(tail), self.exact, len(tail), time.perf_counter() - started)

    def _unmark(self, record: EditRecord) -> None:
        for span in record.erased:
            self._ledger.unmark(span)
        self._ledger.set_in_cache(record.dropped, True)
        self._records.pop(record.receipt.id)
        self._repair = None

    def _ledger_without(self, record: EditRecord) -> SpanLedger:
        ledger = self._ledger.copy()
        for span in record.erased:
            ledger.unmark(span)
        ledger.set_in_cache(record.dropped, True)
        return ledger

    def _ids_of_slots_before(self, record: EditRecord) -> list[int]:
        """Ids of the slots that the cache had when the edit was made."""
        undo = record.undo()
        assert undo is not None
        return self._slot_ids(self._ledger_without(record))[: undo.length]

    def _restore_by_recomputing(self, record: EditRecord) -> int:
        """Bring a span back from its ids: everything from it on is recomputed exactly; returns the number of tokens."""
        ledger = self._ledger_without(record)
        slot = ledger.to_cache(record.receipt.spans[0].start)
        marks = get_marks(self.cache)
        start = min(slot, cache_length(self.cache) if marks.exact else marks.approximate_from or 0)
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._slot_ids(ledger)
        saved = Undo.take(self.cache, Plan(start), marks)
        try:
            truncate(self.cache, start)
            self._extend_cache(ids)
        except BaseException:
            with uninterrupted():
                saved.put_back(self.cache)
            raise
        with uninterrupted():
            self._records.pop(record.receipt.id)
            self._became_exact(ledger)
        return len(ids) - start
