"""Erasing ledger spans.

Knows: methods, receipts, the ledger. Does not know about restoring or repairing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kveraser.cache import Tokens
from kveraser.context.ids import IdBuffer
from kveraser.context.state import ContextState, EditRecord
from kveraser.edit import run_edit, run_readers
from kveraser.eraser import KVEraser
from kveraser.methods import EraseMethod, EraseReceipt, as_method
from kveraser.spans import Span, merge_spans


class Erasing(ContextState):
    """`erase_spans` and `readers_of`."""

    def erase_spans(
        self, spans: Span | Iterable[Span], method: str | EraseMethod | KVEraser = "kveraser", *, undo: bool = True
    ) -> EraseReceipt:
        """Erase ledger spans; see `ErasableContext.erase`."""
        with self._lock:
            chosen = as_method(method)
            wanted, slots = self._located(spans)
            final: list[EraseReceipt] = []

            def commit(receipt: EraseReceipt) -> None:
                run_again = tuple(part for run in receipt.recomputed for part in self._ledger.from_cache(run))
                entered = replace(receipt, spans=wanted, recomputed=run_again)
                self._commit(entered, chosen.removes)
                final.append(entered)

            tokens = Tokens(self._slots.view[None])
            find = partial(self.backend.find_eraser, self.eraser)
            run_edit(self.backend, tokens, slots, chosen, find, undo, commit, self._calibration_text())
            return final[0]

    def readers_of(self, spans: Span | Iterable[Span]) -> Tensor:
        """Who has read ledger spans; see `ErasableContext.readers`."""
        with self._lock:
            _, slots = self._located(spans)
            tokens = Tokens(self._slots.view[None])
            find = partial(self.backend.find_eraser, self.eraser)
            masses = run_readers(self.backend, tokens, slots, find, self._calibration_text())[0]
            found = torch.zeros(self._ledger.length, device=masses.device)
            for run in self._ledger.from_cache(Span(slots[0].start, self.backend.length)):
                first = self._ledger.to_cache(run.start)
                found[run.slice] = masses[first : first + len(run)]
            return found

    def _located(self, spans: Span | Iterable[Span]) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """Live ledger spans, sorted, and the slots that hold them."""
        wanted = merge_spans([spans] if isinstance(spans, Span) else spans, self._ledger.length)
        for span in wanted:
            self._ledger.check_live(span)
        return wanted, merge_spans((self._ledger.span_to_cache(span) for span in wanted), self.backend.length)

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
        self._enter_record(record)

    def _follow(self, receipt: EraseReceipt) -> None:
        """Keep the slot ids in step with the cache."""
        for span, source in receipt.stand_ins:
            self._slots.view[span.slice] = self._slots.view[source]
        if receipt.removed:
            self._slots = IdBuffer(replace(receipt, stand_ins=()).token_ids(self._slots.view), self._slots.view.device)
