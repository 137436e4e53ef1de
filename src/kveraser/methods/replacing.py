"""New tokens in the place of a span: what really changes, where the new ids go, and room for those that the span has no slots for.

Knows: edits, tokens, slots. Does not know how a method computes states, or what is done with the slots that are left over.

    span         [ a b c d e )                new tokens take the first slots of the span; those that are left over are the method's
    shorter      [ x y )[ c d e )             to drop or to hide. Where the new text is longer, room is made behind the span
    longer       [ v w x y z + + )            first, in which case it looks to a method as if the span had always been so long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kveraser.cache import Tokens
from kveraser.errors import SpanError
from kveraser.methods.base import Edit, Outcome
from kveraser.methods.receipt import Put
from kveraser.spans import Span, remap


@dataclass(frozen=True)
class Change:
    """A span that is to say something else: `ids` `(rows, n)`, maybe none."""

    span: Span
    ids: Tensor

    @property
    def count(self) -> int:
        """How many new tokens there are."""
        return self.ids.shape[1]

    @property
    def growth(self) -> int:
        """How many more than the span has slots."""
        return max(self.count - len(self.span), 0)

    def put_before(self, end: int) -> Put:
        """What becomes of the ids; everything from slot `end` on was cropped."""
        start = self.span.start
        stop = start if start >= end else self.span.end if self.growth else start + self.count
        return Put(start, stop, tuple(map(tuple, self.ids.tolist())))


def check_changes(changes: tuple[Change, ...], tokens: Tokens) -> None:
    """Raise `SpanError` where a row has padding in a span: nothing can be said there."""
    for change in changes:
        if change.count and tokens.mask is not None and not bool(tokens.mask[:, change.span.slice].all()):
            raise SpanError(f"span {change.span} holds padding in some row; replace in rows that have text there")


def differing(changes: tuple[Change, ...], tokens: Tokens) -> tuple[Change, ...]:
    """What of some changes is one: not what is equal, nor the ids that a span and its new text begin with alike."""
    found = []
    for change in changes:
        span, ids = change.span, change.ids.expand(tokens.ids.shape[0], -1)
        held = tokens.ids[:, span.slice]
        if held.shape == ids.shape and torch.equal(held, ids):
            continue
        most = min(len(span) - 1, ids.shape[1])
        alike = (held[:, :most] == ids[:, :most]).all(0).long().cumprod(0).sum()
        start = span.start + int(alike)
        found.append(Change(Span(start, span.end), ids[:, int(alike) :]))
    return tuple(found)


def place(edit: Edit, changes: tuple[Change, ...]) -> Edit:
    """The edit with the new ids among its tokens, in slots as they are once there is room for all of them.

    Args:
        changes: of each of the edit's spans; () for an erase.
    """
    if not changes:
        return edit
    tokens, marks, moved = edit.tokens, edit.marks, 0
    spans: list[Span] = []
    blank: list[Span] = []
    for change in changes:
        span = change.span.shift(moved)
        if change.growth:
            tokens = tokens.opened(span.end, change.growth)
            marks = marks.opened(span.end, change.growth)
            blank.append(Span(span.end, span.end + change.growth))
            moved += change.growth
            span = Span(span.start, blank[-1].end)
        tokens = tokens.with_ids(span.start, change.ids)
        spans.append(span)
    new = tuple(change.count for change in changes)
    return replace(edit, tokens=tokens, spans=tuple(spans), marks=marks, new=new, blank=tuple(blank))


def before_room(edit: Edit, outcome: Outcome) -> Outcome:
    """An outcome in slots as they were before there was room; none of what it names is room."""
    if not edit.blank:
        return outcome
    removed, steered, recomputed = (
        tuple(remap(span, edit.blank) for span in spans)
        for spans in (outcome.removed, outcome.steered, outcome.recomputed)
    )
    return replace(outcome, removed=removed, steered=steered, recomputed=recomputed)


def replacements(given: tuple[Change, ...], puts: tuple[Put, ...], removed: tuple[Span, ...]) -> tuple[Span, ...]:
    """Where new texts are after an edit; of those that are empty, nothing."""
    found = []
    for change in given:
        start = change.span.start
        gone = sum(min(cut.end, start) - cut.start for cut in removed if cut.start < start)
        grown = sum(len(put) - (put.end - put.start) for put in puts if put.start < start)
        if change.count:
            found.append(Span(start - gone + grown, start - gone + grown + change.count))
    return tuple(found)
