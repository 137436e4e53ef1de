"""The transaction around every erase: the cache and the caller's records change together, or not at all.

Knows: backends, plans, outcomes, undoing, receipts. Does not know how any method works, or what the caller's records are.

Checks come before anything is touched; spans that end the context are cropped; the states that the plan names are kept
first, and put back when the method fails or is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from kveraser.cache import EditMark
from kveraser.errors import OptionError, SpanError
from kveraser.interrupts import uninterrupted
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.receipt import EraseReceipt
from kveraser.methods.slots import find_stand_ins, split_tail
from kveraser.methods.undo import Undo
from kveraser.spans import Span


def transact(
    method: EraseMethod, edit: Edit, *, undo: bool = True, commit: Callable[[EraseReceipt], None] | None = None
) -> EraseReceipt:
    """Erase `edit.spans` (here they may end the cache) with a method, or with the one that it chooses.

    Args:
        undo: keep the replaced states in the receipt.
        commit: called with the receipt once the cache is edited, as part of the transaction.

    Raises:
        SpanError: a span holds slots that are erased already.
        OptionError: the backend cannot do what the method needs.
    """
    _check(method, edit)
    method, backend = method.chosen(edit), edit.backend
    backend.finish()
    started = time.perf_counter()
    rest, end = (
        split_tail(edit.spans, edit.marks.steered_spans, edit.length) if method.removes else (edit.spans, edit.length)
    )
    inner = replace(edit, spans=rest, tokens=edit.tokens.head(end), marks=edit.marks.truncate(end))
    busy = bool(rest) or (method.mends and not inner.marks.exact)
    plan = method.plan(inner) if busy else Plan(end)
    saved = Undo.take(backend, edit.marks, plan.layout_from, plan.in_place)
    committed = False
    try:
        backend.crop(end)
        with backend.writing():
            outcome = method.apply(inner, plan) if busy else Outcome(inner.marks)
        backend.finish()
        receipt = _receipt(method, edit, end, outcome, time.perf_counter() - started, saved if undo else None)
        in_place = plan.layout_from >= edit.length
        before, after = edit.marks.approximate_from, outcome.marks.approximate_from
        mark = EditMark(receipt.id, backend.length, in_place, before, after, plan.in_place)
        with uninterrupted():
            if commit is not None:
                commit(receipt)
            backend.marks = replace(outcome.marks, edits=(*edit.marks.edits, mark))
            committed = True
    except BaseException:
        if not committed:
            with uninterrupted():
                saved.put_back(backend)
        raise
    if not undo:
        saved.clear()
    return receipt


def _check(method: EraseMethod, edit: Edit) -> None:
    if missing := method.needs - edit.backend.can:
        which = " or ".join(sorted(what.value for what in missing))
        raise OptionError(
            f"{method.name} cannot be done in {edit.backend.name}'s cache, which cannot {which}; full-recompute can"
        )
    for span in edit.spans:
        for steered in edit.marks.steered_spans:
            if span.overlaps(steered):
                raise SpanError(f"span {span} overlaps {steered}, which is erased already; restore that one first")


def _receipt(
    method: EraseMethod, edit: Edit, end: int, outcome: Outcome, seconds: float, undo: Undo | None
) -> EraseReceipt:
    """The receipt of an edit whose cache was cropped at `end`."""
    removed = (*outcome.removed, Span(end, edit.length)) if end < edit.length else outcome.removed
    still = (entry for entry in edit.marks.steered_spans if not any(entry.overlaps(cut) for cut in removed))
    exact = outcome.marks.exact and method.removes
    return EraseReceipt(
        method=method.name,
        spans=edit.spans,
        exact=exact,
        tokens_removed=sum(map(len, edit.spans)) if method.removes else 0,
        tokens_recomputed=outcome.tokens_recomputed,
        bytes_written=outcome.bytes_written,
        seconds=seconds,
        positions_kept=not outcome.removed,
        residual=0.0 if exact else outcome.residual,
        recomputed=outcome.recomputed,
        eraser=outcome.eraser,
        notes=outcome.notes,
        removed=removed,
        steered=outcome.steered,
        stand_ins=find_stand_ins(edit.spans, removed, (*outcome.steered, *still), edit.length),
        undo=undo,
    )
