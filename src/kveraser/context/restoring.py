"""Undoing erases.

Knows: receipts, what can be put back and what has to be recomputed. Does not know how the erases were made. A backend that cannot
repair single tokens gets everything behind the span recomputed instead.

An older edit's kept states may have read what a later one erased. Such states are not put back: their tokens are computed
anew without it. They are handed on to the later edit, whose own restoring then brings them back, so that restoring all
edits, in whatever order, ends bit for bit where it began.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kveraser.cache import Can, EditMark, Repair, slots_of
from kveraser.context.state import PURGED, ContextState, EditRecord
from kveraser.errors import RestoreError
from kveraser.methods import EraseReceipt, Undo, put_back
from kveraser.methods.putting_back import check_put_back, stale_from
from kveraser.methods.undo import put_back_on_failure
from kveraser.spans import Span, SpanLedger, gaps, union_spans


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did.

    Attributes:
        bit_exact: whether every state is the very one from before the erase.
        exact: whether the whole cache now equals a fresh prefill of what is in the context.
        tokens_recomputed: tokens that were run again (those appended since, those whose kept states had read what was erased
            later, or everything behind the span).
        seconds: wall-clock time.
    """

    bit_exact: bool
    exact: bool
    tokens_recomputed: int
    seconds: float


class Restoring(ContextState):
    """`restore`."""

    @torch.no_grad()
    def restore(self, receipt: EraseReceipt) -> RestoreReport:
        """Undo an erase.

        Bit-exact for the newest edit while nothing was appended since, and for an older one that stayed in place and is
        not behind what later ones erased. Otherwise what is needed is recomputed: the tokens appended since, those whose
        kept states had read what was erased later, or everything behind the span; the report says so. Restoring all
        in-place edits in any order ends bit for bit at the states before the first.

        Raises:
            RestoreError: a receipt of another context, restored before, or made final by `purge`. Nothing is changed.
        """
        with self._lock:
            self.backend.finish()
            started = time.perf_counter()
            record = self._record(receipt)
            self._check_stands(record)
            backend, marks = self.backend, self.backend.marks
            undo = record.undo()
            place = next((index for index, edit in enumerate(marks.edits) if edit.id == receipt.id), None)
            if undo is None or undo.cleared or place is None:
                recomputed = self._restore_by_recomputing(record)
                return RestoreReport(False, self.exact, recomputed, self._since(started))
            mark, later = marks.edits[place], marks.edits[place + 1 :]
            steady = mark.in_place and all(edit.in_place for edit in later) and backend.length == mark.length_after
            if later and steady and undo.kept and Can.REPAIR in backend.can:
                recomputed = self._restore_in_place(record, undo, stale_from(later))
                return RestoreReport(not recomputed, self.exact, recomputed, self._since(started))
            whole = replace(receipt, undo=undo)
            try:
                check_put_back(backend, whole)
            except RestoreError:
                recomputed = self._restore_by_recomputing(record)
                return RestoreReport(False, self.exact, recomputed, self._since(started))
            tail = self._slots.view[mark.length_after :].clone()
            ledger = self._ledger_without(record)
            with put_back_on_failure(backend, marks, undo.layout_from, undo.kept) as committing:
                put_back(backend, whole)
                if len(tail):
                    backend.crop(undo.length)
                    backend.extend(self._tokens_of([*self._slot_ids(ledger)[: undo.length], *tail.tolist()]))
                with committing():
                    self._enter_undone(record, ledger)
            return RestoreReport(not len(tail), self.exact, len(tail), self._since(started))

    def _since(self, started: float) -> float:
        """Seconds since then, when all is done."""
        self.backend.finish()
        return time.perf_counter() - started

    def _restore_in_place(self, record: EditRecord, undo: Undo, stale: float) -> int:
        """Restore an edit under later ones, none of which moved a slot; returns how many tokens were recomputed.

        Args:
            stale: the first slot whose kept state must not come back.
        """
        backend, marks = self.backend, self.backend.marks
        ids = [edit.id for edit in marks.edits]
        later = marks.edits[ids.index(record.receipt.id) + 1 :]
        others = [entry for entry in marks.steered if entry.span not in record.receipt.steered]
        hidden = tuple(sorted(entry.span for entry in others))
        first = min(span.start for span in undo.kept)
        kept = [(span, *_split(span, stale)) for span in sorted(undo.kept)]
        behind = [part for _, _, part in kept if part is not None]
        revised = [span for edit in later for span in edit.written if span.end > first]
        again = [
            run
            for span in union_spans((*behind, *revised))
            if span.end > first
            for run in _outside(hidden, Span(max(span.start, first), span.end))
        ]
        touched = union_spans((*undo.kept, *again))
        ledger = self._ledger_without(record)
        with put_back_on_failure(backend, marks, backend.length, touched) as committing:
            backend.put_all([(part, undo.states_of(part)) for _, part, _ in kept if part is not None])
            if again:
                slots = slots_of(again, self.device)
                sees = slots_of(gaps(hidden, backend.length), self.device)
                tokens = self._tokens_of(self._slot_ids(ledger))
                for repair in Repair(slots, sees, hidden).parts(backend.chunk):
                    backend.rewrite(tokens, (), [repair])
            with committing():
                for _, _, part in kept:
                    if part is not None:
                        self._hand_on(undo, part, later)
                backend.marks = replace(marks, steered=tuple(others)).without_edits({record.receipt.id})
                self._enter_undone(record, ledger)
        return sum(map(len, again))

    def _hand_on(self, undo: Undo, span: Span, later: Sequence[EditMark]) -> None:
        """Let later edits bring back states that they made stale, each state by the first edit that did."""
        rest: Span | None = span
        for edit in later:
            if rest is None:
                return
            rest, part = _split(rest, stale_from([edit]))
            theirs = self._records[edit.id].undo() if edit.id in self._records else None
            if part is not None and theirs is not None and not theirs.cleared:
                theirs.adopt(part, undo.states_of(part))

    def _enter_undone(self, record: EditRecord, ledger: SpanLedger) -> None:
        """Enter that an edit is undone, with the ledger as it is without it."""
        slots = self._new_slots(ledger)
        self._ledger, self._slots, self._repair = ledger, slots, None
        self._forget_record(record)

    def _check_stands(self, record: EditRecord) -> None:
        """Raise unless all that a replacement put in is there as it put it in."""
        for span in record.placed:
            gone = next((other for other in self._ledger.erased if other.span.overlaps(span)), None)
            if gone is not None:
                raise RestoreError(
                    f"a later edit took {gone.span} out of {span}, which had replaced {record.receipt.span}; restore that one first"
                )

    def _ledger_without(self, record: EditRecord) -> SpanLedger:
        ledger = self._ledger.copy()
        for span in record.erased:
            ledger.unmark(span)
        for span in record.placed:
            ledger.withdraw(span)
        ledger.set_in_cache(record.dropped, True)
        return ledger

    def _forget_record(self, record: EditRecord) -> None:
        """Drop the record of an edit that is undone, what it had kept, and the ids that it had put in: they were never said."""
        self._drop_record(record)
        if (undo := record.undo()) is not None:
            undo.clear()
        for span in record.placed:
            self._ids.view[span.slice] = PURGED

    def _restore_by_recomputing(self, record: EditRecord) -> int:
        """Bring a span back from its ids: everything from it on is recomputed exactly; returns the number of tokens."""
        ledger = self._ledger_without(record)
        slot = min(ledger.to_cache(span.start) for span in record.receipt.spans)
        backend, marks = self.backend, self.backend.marks
        start = min(slot, backend.length if marks.exact else marks.approximate_from or 0)
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._slot_ids(ledger)
        if backend.capacity is not None and len(ids) > backend.capacity:
            raise RestoreError(
                f"the context with {record.receipt.span} in it would have {len(ids)} tokens, and has room for "
                f"{backend.capacity}; erase something else first"
            )
        with put_back_on_failure(backend, marks, start) as committing:
            backend.crop(start)
            backend.extend(self._tokens_of(ids))
            with committing():
                self._became_exact(ledger)
                self._forget_record(record)
        return len(ids) - start


def _outside(hidden: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """The parts of a span that are in none of the hidden ones."""
    return gaps([entry for entry in hidden if entry.overlaps(span)], span.end, span.start)


def _split(span: Span, at: float) -> tuple[Span | None, Span | None]:
    """The parts of a span before a slot, and from it on."""
    if at >= span.end:
        return span, None
    if at <= span.start:
        return None, span
    return Span(span.start, int(at)), Span(int(at), span.end)
