"""The transaction around every erase: the cache and the caller's records change together, or not at all.

Knows: backends, plans, outcomes, undoing, receipts. Does not know how any method works, or what the caller's records are.

Checks come before anything is touched; spans that end the context are cropped, and what replaces them is read anew; the states
that the plan names are kept first, and put back when the method fails or is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from kveraser.cache import Backend, Can, EditMark
from kveraser.errors import OptionError, SpanError, UnsupportedCacheError
from kveraser.interrupts import uninterrupted
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.full_recompute import FullRecompute
from kveraser.methods.receipt import EraseReceipt
from kveraser.methods.replacing import Change, before_room, check_changes, differing, place, replacements
from kveraser.methods.slots import find_stand_ins, split_tail
from kveraser.methods.undo import Undo
from kveraser.spans import Span


def transact(
    method: EraseMethod,
    edit: Edit,
    *,
    changes: tuple[Change, ...] = (),
    undo: bool = True,
    commit: Callable[[EraseReceipt], None] | None = None,
) -> EraseReceipt:
    """Erase `edit.spans` (here they may end the cache) with a method, or with the one that it chooses.

    Args:
        changes: what each of the spans is to say instead; () to erase them.
        undo: keep the replaced states in the receipt.
        commit: called with the receipt once the cache is edited, as part of the transaction.

    Raises:
        SpanError: a span holds slots that are erased already, or (to say something else) padding.
        OptionError: the backend cannot do what the method needs, or the method cannot replace.
    """
    _check(method, edit, changes)
    asked, backend = edit, edit.backend
    changed = differing(changes, edit.tokens) if method.removes else ()
    if changes:
        edit = replace(edit, spans=tuple(c.span for c in changed), new=tuple(c.count for c in changed))
    idle = not edit.spans and bool(changes)
    method = method if idle else method.chosen(edit)
    backend.finish()
    started = time.perf_counter()
    rest, end = edit.spans, edit.length
    if method.removes and not idle:
        rest, end = split_tail(rest, edit.marks.steered_spans, end)
    inner = replace(
        edit, spans=rest, new=edit.new[: len(rest)], tokens=edit.tokens.head(end), marks=edit.marks.truncate(end)
    )
    inner, last = place(inner, changed[: len(rest)]), changed[len(rest) :]
    if inner.blank and not (method.rebuilds or _opens(backend)):
        method = FullRecompute()
    busy = bool(rest) or (method.mends and not inner.marks.exact and not idle)
    opens = bool(inner.blank) and not method.rebuilds
    plan = Plan(backend.moves_from(rest[0].start)) if opens else method.plan(inner) if busy else Plan(end)
    saved = Undo.take(backend, edit.marks, plan.layout_from, plan.in_place)
    committed = False
    try:
        backend.crop(end)
        with backend.writing():
            if opens:
                backend.open(inner.tokens, inner.blank, inner.marks.steered_spans)
                backend.marks = inner.marks  # those that fit the slots as they are from now on
            step = method.plan(inner) if opens else plan
            outcome = method.apply(inner, step) if busy else Outcome(inner.marks)
            outcome = _followed(inner, outcome, last)
        backend.finish()
        receipt = _receipt(
            method, asked, changes, changed, end, before_room(inner, outcome), time.perf_counter() - started,
            saved if undo else None,
        )  # fmt: skip
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


def _opens(backend: Backend) -> bool:
    """Whether room can be made in a cache."""
    if Can.OPEN not in backend.can:
        return False
    try:
        backend.check_movable()
    except UnsupportedCacheError:
        return False
    return True


def _check(method: EraseMethod, edit: Edit, changes: tuple[Change, ...]) -> None:
    new = method.removes and any(change.count for change in changes)
    if new and not method.replaces:
        raise OptionError(f"{method.name} erases only; replace with full-recompute or kveraser, or erase and append")
    needs = method.needs | ({Can.RECOMPUTE} if new and not method.rebuilds else set())
    if missing := needs - edit.backend.can:
        which = " or ".join(sorted(what.value for what in missing))
        raise OptionError(
            f"{method.name} cannot be done in {edit.backend.name}'s cache, which cannot {which}; full-recompute can"
        )
    check_changes(changes, edit.tokens)
    check_live(edit)


def check_live(edit: Edit) -> None:
    """Raise `SpanError` where a span holds slots that are erased already."""
    for span in edit.spans:
        for steered in edit.marks.steered_spans:
            if span.overlaps(steered):
                raise SpanError(f"span {span} overlaps {steered}, which is erased already; restore that one first")


def _followed(edit: Edit, outcome: Outcome, last: tuple[Change, ...]) -> Outcome:
    """What was done, and the text that replaces what ended the context: it is read like any other that is appended."""
    count = sum(change.count for change in last)
    if not count:
        return outcome
    tokens = edit.tokens.without(outcome.removed)
    end = tokens.length
    tokens = tokens.opened(end, count).with_ids(end, torch.cat([change.ids for change in last], -1))
    edit.backend.marks = outcome.marks
    edit.backend.extend(tokens)
    return replace(
        outcome,
        tokens_recomputed=outcome.tokens_recomputed + count,
        bytes_written=outcome.bytes_written + count * edit.backend.bytes_per_slot,
    )


def _receipt(
    method: EraseMethod, edit: Edit, changes: tuple[Change, ...], changed: tuple[Change, ...], end: int, outcome: Outcome,
    seconds: float, undo: Undo | None,
) -> EraseReceipt:  # fmt: skip
    """The receipt of an edit whose cache was cropped at `end`."""
    removed = (*outcome.removed, Span(end, edit.length)) if end < edit.length else outcome.removed
    still = (entry for entry in edit.marks.steered_spans if not any(entry.overlaps(cut) for cut in removed))
    exact = outcome.marks.exact and method.removes
    puts = tuple(change.put_before(end) for change in changed if change.count)
    return EraseReceipt(
        method=method.name,
        spans=edit.spans,
        exact=exact,
        tokens_removed=sum(map(len, edit.spans)) if method.removes and (changed or not changes) else 0,
        tokens_recomputed=outcome.tokens_recomputed,
        bytes_written=outcome.bytes_written,
        seconds=seconds,
        positions_kept=not outcome.removed and not any(change.growth for change in changed),
        residual=0.0 if exact else outcome.residual,
        recomputed=outcome.recomputed,
        eraser=outcome.eraser,
        notes=outcome.notes,
        replacements=replacements(changes, puts, removed) if method.removes else (),
        removed=removed,
        steered=outcome.steered,
        stand_ins=find_stand_ins(edit.spans, removed, (*outcome.steered, *still), edit.length),
        puts=puts,
        undo=undo,
    )
