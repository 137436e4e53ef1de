"""Erasing ledger spans from a llama.cpp context: one transaction for every method.

Knows: methods, passes over cells, receipts. Does not know about text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from kveraser.cache import EditMark, Marks, Steered, Window
from kveraser.engines.llama_cpp import passes
from kveraser.engines.llama_cpp.cells import LIVE
from kveraser.engines.llama_cpp.kept import KeptCells
from kveraser.engines.llama_cpp.state import EditRecord, LlamaCppReceipt, LlamaCppState
from kveraser.errors import OptionError
from kveraser.interrupts import uninterrupted
from kveraser.methods import (
    DeleteAndShift,
    EraseMethod,
    FullRecompute,
    NoErase,
    Outcome,
    Plan,
    Steering,
    as_method,
)
from kveraser.methods.slots import neighbors, split_tail
from kveraser.spans import Span, gaps, merge_spans

METHODS = (NoErase, FullRecompute, DeleteAndShift, Steering)
"""What can be done to llama.cpp's cells; the other methods write into chosen ones, which its interface does not allow."""


class Erasing(LlamaCppState):
    """`erase_spans`."""

    def erase_spans(
        self, spans: Span | Iterable[Span], method: str | EraseMethod = "kveraser", *, undo: bool = True
    ) -> LlamaCppReceipt:
        """Erase ledger spans; see `LlamaCppContext.erase`."""
        with self._lock:
            started = time.perf_counter()
            chosen = self._chosen(method)
            wanted = merge_spans([spans] if isinstance(spans, Span) else spans, self._ledger.length)
            for span in wanted:
                self._ledger.check_live(span)
            length, marks = self._slots, self._marks
            slots = merge_spans((self._ledger.span_to_cache(span) for span in wanted), length)
            rest, end = split_tail(slots, marks.steered_spans, length) if chosen.removes else (slots, length)
            inner = marks.truncate(end)
            busy = bool(rest) or (chosen.mends and not inner.exact)
            plan = self._plan(chosen, rest, end, inner) if busy and chosen.removes else Plan(end)
            if isinstance(chosen, Steering) and self._repair(chosen):
                self._cells.check_movable()
            if self._moves(chosen, rest, end, inner):
                self._cells.check_movable()
                plan = Plan(self._touched_from(plan.layout_from, True), plan.in_place)
            kept = KeptCells.take(self._cells, length, plan.layout_from, plan.in_place, marks)
            committed = False
            try:
                if end < length:
                    self._cells.remove(LIVE, Span(end, length))
                outcome = self._apply(chosen, rest, end, inner, plan) if busy else Outcome(inner)
                removed = (*outcome.removed, Span(end, length)) if end < length else outcome.removed
                receipt = LlamaCppReceipt(
                    method=chosen.name,
                    spans=wanted,
                    exact=outcome.marks.exact and chosen.removes,
                    tokens_removed=sum(map(len, wanted)) if chosen.removes else 0,
                    tokens_recomputed=outcome.tokens_recomputed,
                    bytes_written=outcome.bytes_written,
                    seconds=time.perf_counter() - started,
                    positions_kept=not outcome.removed,
                    removed=removed,
                    steered=outcome.steered,
                    kept=kept if undo else None,
                )
                with uninterrupted():
                    self._commit(receipt, outcome.marks, plan, chosen.removes)
                    committed = True
            except BaseException:
                if not committed:
                    with uninterrupted():
                        kept.put_back(self._cells)
                raise
            return receipt

    def _commit(self, receipt: LlamaCppReceipt, marks: Marks, plan: Plan, removes: bool) -> None:
        dropped: tuple[Span, ...] = ()
        before, in_place = self._marks, plan.layout_from >= self._slots
        if removes:
            slot_of = {span: self._ledger.to_cache(span.start) for span in receipt.spans}
            dropped = self._ledger.drop_slots(receipt.removed)
            for span, slot in slot_of.items():
                self._ledger.mark(span, in_cache=any(slot in steered for steered in receipt.steered))
        known = before.approximate_from, marks.approximate_from
        edit = EditMark(receipt.id, self._slots, in_place, *known, written=plan.in_place)
        self._marks = replace(marks, edits=(*before.edits, edit))
        self._records[receipt.id] = EditRecord(replace(receipt, kept=None), dropped)

    # -- methods

    def _chosen(self, method: str | EraseMethod) -> EraseMethod:
        chosen = as_method(method)
        if not isinstance(chosen, METHODS):
            names = ", ".join(kind.name for kind in METHODS)
            raise OptionError(f"{chosen.name} cannot be done in llama.cpp's cache; there are: {names}")
        if isinstance(chosen, Steering):
            if chosen.eraser is not None:
                raise OptionError(
                    "a KVEraser holds weights for transformers; give the context its GGUF form: "
                    "LlamaCppContext(model, model.find_eraser(folder))"
                )
            if self.eraser is None:
                self.eraser = self.model.find_eraser()
            if self._adapter is None:
                self._adapter = self.model.load_adapter(self.eraser)
            passes.check_window(self._window(chosen))
        return chosen

    def _window(self, method: Steering) -> Window | None:
        assert self.eraser is not None
        return None if method.full_prefix else self.eraser.config.window if method.window is None else method.window

    def _repair(self, method: Steering) -> int:
        assert self.eraser is not None
        return self.eraser.config.repair_next if method.repair is None else method.repair

    def _targets(
        self, method: Steering, spans: tuple[Span, ...], end: int, marks: Marks
    ) -> list[tuple[Span, tuple[Span, ...]]]:
        """What steering writes: each span, and the live tokens behind it that are repaired."""
        return neighbors(spans, marks.steered_spans, end, self._repair(method))

    def _moves(self, method: EraseMethod, spans: tuple[Span, ...], end: int, marks: Marks) -> bool:
        """Whether keys of the user's cache will be rotated."""
        if isinstance(method, Steering) and spans:
            found = self._targets(method, spans, end, marks)
            return any(runs and not self._bench_for(method, span) for span, runs in found)
        return isinstance(method, DeleteAndShift) and bool(spans)

    def _bench_for(self, method: Steering, span: Span) -> passes.Bench | None:
        """The small cache to steer a span in; None when it has to be done in the user's."""
        window, repair = self._window(method), self._repair(method)
        if window is None:
            return None
        known = self._bench
        if known is None or sum(window) > sum(known.window) or repair > known.repair:
            if known is not None:
                known.cells.close()
            self._bench = known = passes.Bench(self._cells, window, repair)
        return known if known.fits(window, span, repair) else None

    def _touched_from(self, start: int, moved: bool) -> int:
        """The first slot whose states may change: llama.cpp rotates all keys of the cache at once, those that stay by
        nothing, and quantised ones are thereby rounded again."""
        return 0 if moved and self._cells.rounds_again else start

    def _plan(self, method: EraseMethod, spans: tuple[Span, ...], end: int, marks: Marks) -> Plan:
        """Which slots will change."""
        if isinstance(method, Steering):
            targets = self._targets(method, spans, end, marks)
            return Plan(end, tuple(part for span, runs in targets for part in (span, *runs)))
        starts = [span.start for span in spans]
        if isinstance(method, FullRecompute) and marks.approximate_from is not None:
            starts.append(marks.approximate_from)
        return Plan(min(starts))

    def _apply(self, method: EraseMethod, spans: tuple[Span, ...], end: int, marks: Marks, plan: Plan) -> Outcome:
        if isinstance(method, Steering):
            return self._steer(method, spans, end, marks)
        if isinstance(method, DeleteAndShift):
            passes.delete(self._cells, spans, end)
            left = end - sum(map(len, spans))
            self._cells.settle(0)
            moved = (left - spans[0].start) * self._cells.bytes_per_token
            touched = self._touched_from(spans[0].start, True)
            return Outcome(marks.cut(spans).contaminated(touched), removed=spans, bytes_written=moved)
        if isinstance(method, FullRecompute):
            return self._recompute(method, spans, end, marks, plan.layout_from)
        return Outcome(marks)

    def _steer(self, method: Steering, spans: tuple[Span, ...], end: int, marks: Marks) -> Outcome:
        window = self._window(method)
        count, moved = 0, False
        for span, runs in self._targets(method, spans, end, marks):
            ids = [token for run in runs for token in self._ids_of_slots(run)]
            bench = self._bench_for(method, span)
            if bench:
                bench.steer(self._cells, self._adapter, self._ids_of_slots(span), span, window)
                if runs:
                    bench.rewrite_behind(self._cells, ids, span, runs)
            else:
                passes.steer(self._cells, self._adapter, self._ids_of_slots(span), span, window)
                if runs:
                    passes.rewrite_behind(self._cells, ids, span, runs, window)
                    moved = True
            count += len(span) + len(ids)
        if moved:
            self._cells.settle(0)
        steered = tuple(
            Steered(span, torch.empty(0)) for span in spans
        )  # the ledger says where they are; no probe needed
        return Outcome(
            marks.contaminated(self._touched_from(spans[0].start, moved)).steer(steered),
            steered=spans,
            tokens_recomputed=count,
            bytes_written=count * self._cells.bytes_per_token,
        )

    def _recompute(self, method: FullRecompute, spans: tuple[Span, ...], end: int, marks: Marks, start: int) -> Outcome:
        gone = (*spans, *marks.steered_spans)
        removed = merge_spans(gone, end) if gone else ()
        ids = [token for span in gaps(removed, end, start) for token in self._ids_of_slots(span)]
        passes.recompute(self._cells, ids, start, end, method.chunk)
        return Outcome(
            replace(marks, approximate_from=None, steered=()),
            removed=removed,
            tokens_recomputed=len(ids),
            bytes_written=len(ids) * self._cells.bytes_per_token,
        )
