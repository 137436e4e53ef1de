"""Erasing ledger spans.

Knows: methods, receipts, the ledger. Does not know about restoring or repairing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
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
from kveraser.methods.replacing import Change
from kveraser.spans import Span, common, merge_spans


class Erasing(ContextState):
    """`erase_spans`, `replace_spans` and `readers_of`."""

    def erase_spans(
        self, spans: Span | Iterable[Span], method: str | EraseMethod | KVEraser = "kveraser", *, undo: bool = True
    ) -> EraseReceipt:
        """Erase ledger spans; see `ErasableContext.erase`."""
        with self._lock:
            wanted, slots = self._located(spans)
            return self._edit(wanted, slots, as_method(method), undo)

    def replace_spans(
        self,
        spans: Span | Iterable[Span],
        ids: Sequence[int] | Tensor,
        method: str | EraseMethod | KVEraser = "kveraser",
        *,
        undo: bool = True,
    ) -> EraseReceipt:
        """Let ids stand where a ledger span stood (the first of several); see `ErasableContext.replace`.

        Raises:
            ContextError: an id outside the vocabulary, or no room.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0:
                return self.erase_spans(spans, method, undo=undo)
            wanted, slots = self._located(spans)
            self.backend.check_room(max(len(new) - len(slots[0]), 0))
            return self._edit(wanted, slots, as_method(method), undo, new)

    def _edit(
        self,
        wanted: tuple[Span, ...],
        slots: tuple[Span, ...],
        method: EraseMethod,
        undo: bool,
        new: Tensor | None = None,
    ) -> EraseReceipt:
        """Erase ledger spans, which are in these slots; with new ids, let these stand where the first one is."""
        final: list[EraseReceipt] = []
        tokens = Tokens(self._slots.view[None])
        given = () if new is None else (new.to(self.device)[None], *[tokens.ids[:, :0]] * (len(slots) - 1))

        def commit(receipt: EraseReceipt) -> None:
            run_again = tuple(part for run in receipt.recomputed for part in self._ledger.from_cache(run))
            entered = replace(receipt, spans=wanted, recomputed=run_again)
            final.append(self._commit(entered, method.removes, new))

        find = partial(self.backend.find_eraser, self.eraser)
        changes = tuple(map(Change, slots, given))
        run_edit(self.backend, tokens, slots, method, find, undo, commit, self._calibration_text(), changes)
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
        """Live ledger spans, in the order of the cache, and the slots that hold them."""
        merged = merge_spans([spans] if isinstance(spans, Span) else spans, self._ledger.length)
        for span in merged:
            self._ledger.check_live(span)
        wanted = sorted((part for span in merged for part in self._ledger.parts(span)), key=self._ledger.span_to_cache)
        return tuple(wanted), merge_spans(map(self._ledger.span_to_cache, wanted), self.backend.length)

    def _commit(self, receipt: EraseReceipt, removes: bool, new: Tensor | None = None) -> EraseReceipt:
        """Enter an edit; its receipt as the user gets it."""
        dropped: tuple[Span, ...] = ()
        if removes and receipt.tokens_removed:
            slots_of = {span: self._ledger.span_to_cache(span) for span in receipt.spans}
            dropped = self._ledger.drop_slots(receipt.removed)
            for span, slots in slots_of.items():
                left = sum(len(part) for steered in receipt.steered if (part := common(steered, slots)))
                self._ledger.mark(span, in_cache=left > 0, taken=len(span) - left if left else 0)
            self._follow(receipt)
            self._repair = None
        if new is not None and removes:
            receipt = replace(
                receipt, replacements=(self._stand_in(receipt, new),), puts=()
            )  # no ids but in the ledger
        record = EditRecord(replace(receipt, undo=None), dropped)
        if receipt.undo is not None:
            record.undo = weakref.ref(receipt.undo)
        self._enter_record(record)
        return receipt

    def _stand_in(self, receipt: EraseReceipt, new: Tensor) -> Span:
        """Enter the ids that stand where the spans stood; they may have been there before."""
        if not receipt.tokens_removed:
            return receipt.spans[0]
        self._ids.append(new)
        placed = self._ledger.append(len(new))
        self._ledger.place(placed, receipt.spans[0].start)
        return placed

    def _follow(self, receipt: EraseReceipt) -> None:
        """Keep the slot ids in step with the cache."""
        if receipt.removed or receipt.puts:
            self._slots = IdBuffer(receipt.token_ids(self._slots.view), self._slots.view.device)
            return
        for span, source in receipt.stand_ins:
            self._slots.view[span.slice] = self._slots.view[source]
