"""Spans: half-open ranges `[start, end)` of token positions, and the ledger that keeps them valid for ever.

Knows: integers. Does not know about tensors, caches, tokenizers or models.

A *ledger position* is fixed when a token is appended. A *cache position* (slot) is where its states are now. The two
differ once an erase has removed slots. An erased span may also keep its slots, with steering states in them.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kveraser.errors import SpanError


@dataclass(frozen=True, order=True)
class Span:
    """A half-open range `[start, end)` of token positions; never empty.

    Raises:
        SpanError: for a negative, empty or reversed range, or bounds that are not integers.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        try:
            start, end = operator.index(self.start), operator.index(self.end)
        except TypeError:
            raise SpanError(f"a span needs two integers, got Span({self.start!r}, {self.end!r})") from None
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", end)
        if start < 0:
            raise SpanError(f"Span({start}, {end}) starts before position 0; give positions from 0, not from the end")
        if end == start:
            raise SpanError(f"Span({start}, {end}) is empty; a span [start, end) needs start < end")
        if end < start:
            raise SpanError(f"Span({start}, {end}) is reversed; did you mean Span({end}, {start})?")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.start <= position < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    @property
    def slice(self) -> slice:
        """The span as a Python slice."""
        return slice(self.start, self.end)

    def shift(self, delta: int) -> Span:
        """The span moved by `delta` positions."""
        return Span(self.start + delta, self.end + delta)

    def overlaps(self, other: Span) -> bool:
        """Whether the two spans share a position."""
        return self.start < other.end and other.start < self.end


def merge_spans(spans: Iterable[Span], length: int) -> tuple[Span, ...]:
    """Sort spans and join the adjacent ones, having checked them against a context of `length` tokens.

    Raises:
        SpanError: no span at all, something else than a span, one that ends after `length`, or two that overlap.
    """
    given = list(spans) if isinstance(spans, Iterable) and not isinstance(spans, str) else [spans]
    for span in given:
        if not isinstance(span, Span):
            raise SpanError(
                f"a Span is needed, or several; got {given if len(given) > 1 else span!r}. Write kv.Span(3, 7)"
            )
    ordered = sorted(given)
    if not ordered:
        raise SpanError("no span to erase was given")
    merged: list[Span] = []
    for span in ordered:
        if span.end > length:
            raise SpanError(f"span {span} ends after the context, which has {length} tokens")
        if merged and span.start < merged[-1].end:
            raise SpanError(f"spans {merged[-1]} and {span} overlap; join them into one before erasing")
        if merged and span.start == merged[-1].end:
            merged[-1] = Span(merged[-1].start, span.end)
        else:
            merged.append(span)
    return tuple(merged)


def union_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The positions that are in any of the spans, as disjoint spans in order."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return tuple(joined)


def gaps(spans: Iterable[Span], length: int, start: int = 0) -> tuple[Span, ...]:
    """What of `[start, length)` the (sorted, disjoint) spans leave uncovered."""
    free, at = [], start
    for span in spans:
        if span.start > at:
            free.append(Span(at, min(span.start, length)))
        at = max(at, span.end)
    if at < length:
        free.append(Span(at, length))
    return tuple(free)


def remap(span: Span, removed: Iterable[Span]) -> Span:
    """Where `span` is after `removed` spans (sorted, disjoint, not overlapping it) were cut out before it."""
    return span.shift(-sum(len(cut) for cut in removed if cut.end <= span.start))


@dataclass(frozen=True, order=True)
class Erased:
    """An erased span of a ledger; `in_cache` when its slots still exist and hold steering states."""

    span: Span
    in_cache: bool


class SpanLedger:
    """Which ledger positions are erased, and where the others are in the cache.

    Cost of every operation grows with the number of erased spans, never with the number of tokens. What is erased is
    replaced and never changed in place, so that another thread which looks sees one state of it.
    """

    def __init__(self, length: int = 0, erased: Iterable[Erased] = ()) -> None:
        self.length = length
        self._erased: tuple[Erased, ...] = tuple(sorted(erased))

    def copy(self) -> SpanLedger:
        """An independent copy."""
        return SpanLedger(self.length, self._erased)

    @property
    def erased(self) -> tuple[Erased, ...]:
        """The erased spans in order."""
        return self._erased

    @property
    def cache_length(self) -> int:
        """Number of slots: live tokens plus steering states."""
        return self.length - sum(len(entry.span) for entry in self._erased if not entry.in_cache)

    def append(self, count: int) -> Span:
        """Add `count` live positions at the end; returns them."""
        span = Span(self.length, self.length + count)
        self.length += count
        return span

    def mark(self, span: Span, *, in_cache: bool) -> None:
        """Record that the live positions of `span` are erased."""
        self._erased = tuple(sorted((*self._erased, Erased(span, in_cache))))

    def unmark(self, span: Span) -> None:
        """Record that `span`, which was marked as a whole, is live again."""
        self._erased = tuple(entry for entry in self._erased if entry.span != span)

    def drop_slots(self, removed: Iterable[Span]) -> tuple[Span, ...]:
        """Record that the slots `removed` (sorted, disjoint; before the removal) are gone from the cache.

        Returns:
            The erased spans that had steering states there and now have none.
        """
        cuts = list(removed)
        slots = {entry.span: self.to_cache(entry.span.start) for entry in self._erased if entry.in_cache}
        dropped = tuple(span for span, slot in slots.items() if any(slot in cut for cut in cuts))
        self.set_in_cache(dropped, False)
        return dropped

    def set_in_cache(self, spans: Iterable[Span], in_cache: bool) -> None:
        """Record whether the given erased spans have slots."""
        chosen = set(spans)
        self._erased = tuple(Erased(e.span, in_cache) if e.span in chosen else e for e in self._erased)

    def live(self, within: Span | None = None) -> tuple[Span, ...]:
        """The maximal runs of positions that are not erased, in `within` or everywhere."""
        start, end = (within.start, within.end) if within else (0, self.length)
        return gaps((entry.span for entry in self._erased if entry.span.end > start), end, start) if end > start else ()

    def check_live(self, span: Span) -> None:
        """Raise `SpanError` unless every position of `span` is in the ledger and not erased."""
        if span.end > self.length:
            raise SpanError(f"span {span} ends after the context, which has {self.length} tokens")
        index = bisect_right(self._erased, Erased(Span(span.start, span.start + 1), True))
        for entry in self._erased[max(index - 1, 0) :]:
            if entry.span.start >= span.end:
                break
            if entry.span.overlaps(span):
                raise SpanError(f"span {span} overlaps {entry.span}, which is erased already; restore that one first")

    def to_cache(self, position: int) -> int:
        """The slot of a ledger position (of the next slot, when its own was removed)."""
        removed = 0
        for entry in self._erased:
            if entry.span.start >= position:
                break
            if not entry.in_cache:
                removed += min(entry.span.end, position) - entry.span.start
        return position - removed

    def span_to_cache(self, span: Span) -> Span:
        """The slots of a live span (one run: nothing inside it is erased)."""
        start = self.to_cache(span.start)
        return Span(start, start + len(span))

    def from_cache(self, slots: Span) -> tuple[Span, ...]:
        """The ledger positions of some slots, in order."""
        found, at = [], 0
        for run in gaps((entry.span for entry in self._erased if not entry.in_cache), self.length):
            start, end = max(slots.start, at), min(slots.end, at + len(run))
            if start < end:
                found.append(Span(start, end).shift(run.start - at))
            at += len(run)
        return tuple(found)
