"""What an edited cache must remember about itself: where it stopped being exact, and which slots are steered.

Knows: slot numbers, and enough of the states to notice that a slot was overwritten. Does not know about ids or models.
The marks travel with the cache object, so that a deep copy has them as well and no table of caches is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kveraser.spans import Span, remap

_ATTRIBUTE = "kveraser_marks"


@dataclass(frozen=True)
class EditMark:
    """One edit that can still be undone.

    Attributes:
        id: of its receipt.
        length_after: the cache's length right after it.
        in_place: whether every slot stayed where it was.
        before, after: the first slot that may not be exact, before and after the edit (None: all are).
        written: slots that it wrote in their place.
        probe: `(batch, head_dim)`, what the last layer's first value in the last slot looks like; empty where nobody looks.
        rows_moved: whether rows of the batch were reordered, repeated or dropped since: what was kept of it is of the rows as they were.
    """

    id: str
    length_after: int
    in_place: bool
    before: int | None = None
    after: int | None = None
    written: tuple[Span, ...] = ()
    probe: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    rows_moved: bool = False

    def marked(self, cache: Cache) -> EditMark:
        """This mark with the last slot as it is now."""
        if not 0 < self.length_after <= cache.get_seq_length():
            return self
        return replace(self, probe=cache.layers[-1].values[:, 0, self.length_after - 1].clone())

    def holds(self, cache: Cache) -> bool:
        """Whether the last slot, which has read all others, is still there: it may have been cropped since, and filled again."""
        if self.probe.numel() == 0:
            return True
        row = cache.layers[-1].values[0, 0]
        return self.length_after <= len(row) and bool(_among(self.probe, row[self.length_after - 1]))

    def row_by_row(self, cache: Cache) -> bool:
        """Whether every row of the batch is where it was; asked of the newest edit that `holds`."""
        if self.probe.numel() == 0:
            return True
        rows = cache.layers[-1].values[:, 0, self.length_after - 1]
        return torch.equal(self.probe.to(rows), rows)


@dataclass(frozen=True)
class Steered:
    """Slots that hold steering states; `probe` `(batch, slots, head_dim)` is what layer 0's first values there look like."""

    span: Span
    probe: Tensor = field(repr=False, compare=False)

    @classmethod
    def mark(cls, cache: Cache, span: Span) -> Steered:
        """Mark slots that were just written."""
        return cls(span, cache.layers[0].values[:, 0, span.slice].clone())

    @cached_property
    def silent(self) -> bool:
        """Whether they say nothing to whoever attends to them: neutral states, whose values are zero."""
        return self.probe.numel() > 0 and not bool(self.probe.any())

    def until(self, length: int) -> Steered | None:
        """Those of the slots that are among the first `length`."""
        if self.span.end <= length:
            return self
        return replace(self, span=Span(self.span.start, length)) if self.span.start < length else None

    def held(self, cache: Cache) -> Steered | None:
        """Those that still hold steering states: slots may have been cropped and filled again since, while rows of the
        batch may have been reordered, repeated or dropped."""
        rows = cache.layers[0].values[0, 0, self.span.slice]
        return self.until(self.span.start + int(_among(self.probe[:, : len(rows)], rows).cumprod(0).sum()))


def _among(probe: Tensor, row: Tensor) -> Tensor:
    """Whether slots `(..., head_dim)` of one row hold what those of some row `(batch, ..., head_dim)` held."""
    return (probe.to(row) == row).all(-1).any(0)


@dataclass(frozen=True)
class Marks:
    """The state of an edited cache.

    Attributes:
        approximate_from: the first slot whose states may differ from a fresh prefill; None when all are exact.
        steered: slots that hold steering states of erased tokens, in order.
        edits: the edits that can still be undone, oldest first.
    """

    approximate_from: int | None = None
    steered: tuple[Steered, ...] = ()
    edits: tuple[EditMark, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the whole cache equals a fresh prefill of the tokens that remain."""
        return self.approximate_from is None

    @property
    def steered_spans(self) -> tuple[Span, ...]:
        """The steered slots."""
        return tuple(entry.span for entry in self.steered)

    def without_edits(self, undone: set[str]) -> Marks:
        """These marks when the given in-place edits were undone although others followed them."""
        gone = [index for index, edit in enumerate(self.edits) if edit.id in undone]
        if not gone:
            return self
        kept = [edit for edit in self.edits if edit.id not in undone]
        starts = [self.edits[gone[0]].before, *(edit.after for edit in self.edits[gone[0] :] if edit in kept)]
        known = min((start for start in starts if start is not None), default=None)
        return replace(self, approximate_from=known, edits=tuple(kept))

    def contaminated(self, start: int) -> Marks:
        """These marks with everything from slot `start` on no longer known to be exact."""
        known = start if self.approximate_from is None else min(start, self.approximate_from)
        return replace(self, approximate_from=known)

    def steer(self, entries: tuple[Steered, ...]) -> Marks:
        """These marks with more steered slots."""
        return replace(self, steered=tuple(sorted((*self.steered, *entries), key=lambda entry: entry.span)))

    def cut(self, spans: tuple[Span, ...]) -> Marks:
        """These marks after the slots `spans` (sorted, disjoint; steered ones whole or not at all) were removed."""
        steered = tuple(
            replace(entry, span=remap(entry.span, spans))
            for entry in self.steered
            if not any(entry.span.overlaps(removed) for removed in spans)
        )
        start = self.approximate_from
        if start is not None:
            start -= sum(min(removed.end, start) - removed.start for removed in spans if removed.start < start)
        return replace(self, approximate_from=start, steered=steered)

    def opened(self, at: int, count: int) -> Marks:
        """These marks after room for `count` tokens was made from slot `at` on."""
        steered = tuple(
            replace(entry, span=entry.span.shift(count)) if entry.span.start >= at else entry for entry in self.steered
        )
        start = self.approximate_from
        return replace(
            self, approximate_from=start + count if start is not None and start >= at else start, steered=steered
        )

    def truncate(self, length: int) -> Marks:
        """These marks after the cache was cut to `length` slots."""
        start = self.approximate_from
        return replace(
            self,
            approximate_from=None if start is None or start >= length else start,
            steered=tuple(part for entry in self.steered if (part := entry.until(length))),
            edits=_without_last(self.edits, lambda edit: edit.length_after <= length),
        )


def _without_last(edits: tuple[EditMark, ...], stands: Callable[[EditMark], bool]) -> tuple[EditMark, ...]:
    """Edits up to the last one that stands: those before it stand with it."""
    while edits and not stands(edits[-1]):
        edits = edits[:-1]
    return edits


def get_marks(cache: Cache) -> Marks:
    """The cache's marks; those of an untouched cache when it has none. Slots cropped since are forgotten."""
    marks: Marks = getattr(cache, _ATTRIBUTE, Marks()).truncate(int(cache.get_seq_length()))
    with torch.no_grad():
        edits = _without_last(marks.edits, lambda edit: edit.holds(cache))
        if edits and not edits[-1].row_by_row(cache):
            edits = tuple(replace(edit, rows_moved=True) for edit in edits)
        return replace(
            marks, steered=tuple(part for entry in marks.steered if (part := entry.held(cache))), edits=edits
        )


def set_marks(cache: Cache, marks: Marks) -> None:
    """Attach marks to the cache, whose states are those that they are about."""
    edits = (*marks.edits[:-1], *(edit.marked(cache) for edit in marks.edits[-1:]))
    setattr(cache, _ATTRIBUTE, replace(marks, edits=edits))
