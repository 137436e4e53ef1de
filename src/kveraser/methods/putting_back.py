"""Undoing an edit by the states that its receipt kept.

Knows: receipts, marks, what a kept state may have read. Does not know what the states look like; nothing is recomputed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from kveraser.cache import Backend, EditMark
from kveraser.errors import RestoreError
from kveraser.interrupts import uninterrupted
from kveraser.methods.receipt import EraseReceipt
from kveraser.methods.undo import Undo


def check_put_back(backend: Backend, receipt: EraseReceipt) -> Undo:
    """The states by which an edit can be undone now.

    That is so for the newest edit, and for an older one when it and all later ones left every slot in its place, and all that
    it kept lies before what the later ones wrote.

    Raises:
        RestoreError: no such edit on this cache, restored before, its states were freed, slots were cropped or rows moved
            since, or later edits are in the way.
    """
    marks, length = backend.marks, backend.length
    ids = [mark.id for mark in marks.edits]
    if receipt.id not in ids:
        raise RestoreError(
            f"this cache knows no {receipt.method} edit of {receipt.span} with that receipt: it was restored before, "
            "made final, lost what it had left when the cache was cropped since, or belongs to another cache"
        )
    if receipt.undo is None or receipt.undo.cleared:
        raise RestoreError(f"the {receipt.method} edit of {receipt.span} kept no states (undo=False, or purged)")
    index = ids.index(receipt.id)
    mark, later = marks.edits[index], marks.edits[index + 1 :]
    if mark.rows_moved:
        raise RestoreError(
            f"rows of the batch were reordered, repeated or dropped since the {receipt.method} edit of {receipt.span}, whose kept "
            "states are of the rows as they were; put the rows back first, or fill a cache with all ids again"
        )
    if later and not (mark.in_place and all(other.in_place for other in later)):
        raise RestoreError(
            f"{len(later)} later edit(s) moved or replaced what the {receipt.method} edit of {receipt.span} kept; "
            "restore the later ones first, newest to oldest"
        )
    if not later:
        return receipt.undo
    if stale_from(later) < max((span.end for span in receipt.undo.kept), default=0):
        raise RestoreError(  # the kept states may hold what a later edit has erased
            f"a later edit erased something before slots that the {receipt.method} edit of {receipt.span} kept the states of, "
            "which had read it; restore the later one first"
        )
    if length != mark.length_after:
        raise RestoreError("tokens were appended between this edit and a later one; restore the later one first")
    return receipt.undo


def put_back(backend: Backend, receipt: EraseReceipt) -> None:
    """Undo an edit by the states its receipt kept.

    Raises:
        RestoreError: as `check_put_back`; nothing was changed.
    """
    undo, marks = check_put_back(backend, receipt), backend.marks
    ids = [mark.id for mark in marks.edits]
    with uninterrupted():
        if ids[-1] == receipt.id:
            undo.put_back(backend)
            undone = {edit.id for edit in undo.marks.edits} - set(ids)
            backend.marks = undo.marks.without_edits(undone)
            return
        steered = [entry for entry in marks.steered if entry.span not in receipt.steered]
        backend.put_all(undo.regions)
        backend.marks = replace(marks, steered=tuple(steered)).without_edits({receipt.id})


def stale_from(later: Sequence[EditMark]) -> float:
    """The first slot whose state from before some edits must not come back while these stand: it, or what it had read, was
    erased by one of them. (An edit writes nothing before what it erases, and no slot reads what is behind it.)"""
    return min((span.start for edit in later for span in edit.written), default=math.inf)
