"""Spans: half-open ranges `[start, end)` of token positions, and the ledger that keeps them valid for ever.

Knows: integers. Does not know about tensors, caches, tokenizers or models.

A *ledger position* is fixed when a token is appended. A *cache position* (slot) is where its states are now. The two
differ once an erase has removed slots. An erased span may also keep its slots, with steering states in them.

Text that replaces a span gets ledger positions of its own, at the end of the ledger like everything that is new, and *stands*
where the span stood: the order of the cache is then another one than that of the ledger.

    ledger    A A A s s s B B | n n         after `s s s` was replaced by `n n`
    cache     A A A n n * B B               `*`: the slot that is left over, if it stays in place
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

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


def common(one: Span, other: Span) -> Span | None:
    """The positions that are in both."""
    start, end = max(one.start, other.start), min(one.end, other.end)
    return Span(start, end) if start < end else None


def remap(span: Span, removed: Iterable[Span]) -> Span:
    """Where `span` is after `removed` spans (sorted, disjoint, not overlapping it) were cut out before it."""
    return span.shift(-sum(len(cut) for cut in removed if cut.end <= span.start))


@dataclass(frozen=True, order=True)
class Erased:
    """An erased span of a ledger; `in_cache` when slots of it still exist and hold steering states.

    Attributes:
        taken: how many of its slots, from the first on, the text that replaced it has taken.
    """

    span: Span
    in_cache: bool
    taken: int = 0

    @property
    def held(self) -> tuple[int, int]:
        """The positions `[start, end)` that have slots; maybe none."""
        return (self.span.start + self.taken if self.in_cache else self.span.end), self.span.end


@dataclass(frozen=True, order=True)
class Placed:
    """Ledger positions that stand right before another position instead of behind the one that has their number."""

    span: Span
    before: int


Parts = tuple[tuple[Erased, ...], tuple[Placed, ...]]


class _Layout:
    """All positions of a ledger in the order of the cache, worked out once.

    Attributes:
        parts, length: what of a ledger this is about.
        pieces: as runs whose positions follow each other.
        runs: these cut into live and erased runs, each with its entry where it is erased.
        slots: the slot that each of the runs begins at, and behind the last one how many there are.
    """

    def __init__(self, parts: Parts, length: int) -> None:
        self.parts, self.length = parts, length
        erased, placed = parts
        self.pieces = _in_order(placed, length)
        self.runs = tuple(run for piece in self.pieces for run in _cut(piece, erased))
        self.slots = [0]
        for run, entry in self.runs:
            start, end = (run.start, run.end) if entry is None else entry.held
            self.slots.append(self.slots[-1] + end - start)
        self._places = sorted((run.start, place) for place, (run, _) in enumerate(self.runs))

    def place(self, position: int) -> int:
        """Which of the runs holds a position; how many there are, where none does."""
        index = bisect_right(self._places, position, key=lambda known: known[0]) - 1
        place = self._places[index][1] if index >= 0 else len(self.runs)
        return place if place < len(self.runs) and position in self.runs[place][0] else len(self.runs)

    def slot(self, position: int) -> int:
        """As `SpanLedger.to_cache`."""
        place = self.place(position)
        if place == len(self.runs):
            return self.slots[-1]
        run, entry = self.runs[place]
        start, end = (run.start, run.end) if entry is None else entry.held
        return self.slots[place] + max(min(position, end) - start, 0)


def _in_order(placed: tuple[Placed, ...], length: int) -> list[Span]:
    """All positions as runs in the order of the cache."""
    standing: dict[int, list[Span]] = {}
    for entry in placed:
        standing.setdefault(entry.before, []).append(entry.span)
    places = sorted(standing)
    found: list[Span] = []
    waiting = [(span, 0) for span in reversed(gaps((entry.span for entry in placed), length))]
    while waiting:
        piece, done = waiting.pop()  # what stands before positions below `done` was found
        index = bisect_left(places, max(piece.start, done))
        before = places[index] if index < len(places) else piece.end
        if before >= piece.end:
            found.append(piece)
            continue
        if before > piece.start:
            found.append(Span(piece.start, before))
        waiting.append((Span(before, piece.end), before + 1))
        waiting += [(span, 0) for span in reversed(standing[before])]
    return found


def _cut(piece: Span, erased: tuple[Erased, ...]) -> Iterator[tuple[Span, Erased | None]]:
    """A piece as live and erased runs."""
    at, index = piece.start, bisect_left(erased, piece.start, key=lambda known: known.span.start)
    while index < len(erased) and (entry := erased[index]).span.start < piece.end:
        if entry.span.start > at:
            yield Span(at, entry.span.start), None
        yield entry.span, entry
        at, index = entry.span.end, index + 1
    if at < piece.end:
        yield Span(at, piece.end), None


class SpanLedger:
    """Which ledger positions are erased, and where the others are in the cache.

    Cost of every operation grows with the number of erased spans, never with the number of tokens; where all of them lie is worked out
    once for many questions. What is erased, and what was placed elsewhere, is replaced and never changed in place, so that another
    thread which looks sees one state of it.
    """

    def __init__(self, length: int = 0, erased: Iterable[Erased] = (), placed: Iterable[Placed] = ()) -> None:
        self.length = length
        self._parts: Parts = (tuple(sorted(erased)), tuple(sorted(placed)))
        self._known: _Layout | None = None

    def copy(self) -> SpanLedger:
        """An independent copy."""
        return SpanLedger(self.length, *self._parts)

    @property
    def erased(self) -> tuple[Erased, ...]:
        """The erased spans in order."""
        return self._parts[0]

    @property
    def placed(self) -> tuple[Placed, ...]:
        """The spans that stand elsewhere than their numbers say, in order."""
        return self._parts[1]

    @property
    def cache_length(self) -> int:
        """Number of slots: live tokens plus steering states."""
        return self.length - sum(len(entry.span) - (entry.held[1] - entry.held[0]) for entry in self.erased)

    def append(self, count: int) -> Span:
        """Add `count` live positions at the end; returns them."""
        span = Span(self.length, self.length + count)
        self.length += count
        return span

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on, none of which was erased or placed since they were added."""
        self.length = length

    def mark(self, span: Span, *, in_cache: bool, taken: int = 0) -> None:
        """Record that the live positions of `span` are erased; `taken` as of `Erased`."""
        self._set_erased((*self.erased, Erased(span, in_cache, taken)))

    def unmark(self, span: Span) -> None:
        """Record that `span`, which was marked as a whole, is live again."""
        self._set_erased(entry for entry in self.erased if entry.span != span)

    def place(self, span: Span, before: int) -> None:
        """Let `span`, the newest positions, stand right before the position `before`."""
        erased, placed = self._parts
        self._parts = (erased, (*placed, Placed(span, before)))

    def withdraw(self, span: Span) -> None:
        """Record that the live positions `span`, which were placed as a whole, are gone for good."""
        erased, placed = self._parts
        entries = (*erased, Erased(span, False))
        self._parts = (tuple(sorted(entries)), tuple(entry for entry in placed if entry.span != span))

    def drop_slots(self, removed: Iterable[Span]) -> tuple[Span, ...]:
        """Record that the slots `removed` (sorted, disjoint; before the removal) are gone from the cache.

        Returns:
            The erased spans that had steering states there and now have none.
        """
        cuts = list(removed)
        if not cuts:
            return ()
        layout, dropped = self._layout, []
        for (span, entry), slot in zip(layout.runs, layout.slots, strict=False):
            if entry is not None and entry.in_cache:
                index = bisect_right(cuts, slot, key=lambda cut: cut.start) - 1
                dropped += [span] if index >= 0 and slot in cuts[index] else []
        self.set_in_cache(dropped, False)
        return tuple(sorted(dropped))

    def set_in_cache(self, spans: Iterable[Span], in_cache: bool) -> None:
        """Record whether the given erased spans have slots."""
        chosen = set(spans)
        self._set_erased(replace(e, in_cache=in_cache) if e.span in chosen else e for e in self.erased)

    def live(self, within: Span | None = None) -> tuple[Span, ...]:
        """The maximal runs of positions that are not erased, in `within` or everywhere, in the order of the cache."""
        runs = [run for run, entry in self.runs() if entry is None]
        return tuple(runs) if within is None else tuple(found for run in runs if (found := common(run, within)))

    def parts(self, span: Span) -> tuple[Span, ...]:
        """A span cut where its positions do not follow each other in the cache; in the order of the cache."""
        return tuple(found for run in self._layout.pieces if (found := common(run, span)))

    def standing(self, span: Span) -> tuple[Span, ...]:
        """What stands where a span stood: the span itself, or, where it was replaced, the runs that are live there now."""
        placed = sorted(self.placed, key=lambda entry: entry.before)
        live, found, waiting = sorted(self.live()), [], [span]
        while waiting:
            here = waiting.pop()
            first, last = (bisect_left(placed, at, key=lambda entry: entry.before) for at in (here.start, here.end))
            if first == last:
                found.append(here)
                continue
            waiting += [entry.span for entry in placed[first:last]]
            index = max(bisect_right(live, here.start, key=lambda run: run.start) - 1, 0)
            while index < len(live) and live[index].start < here.end:
                found += [part] if (part := common(live[index], here)) else []
                index += 1
        layout = self._layout
        return tuple(sorted(found, key=lambda run: (layout.place(run.start), run.start)))

    def check_live(self, span: Span) -> None:
        """Raise `SpanError` unless every position of `span` is in the ledger and not erased."""
        if span.end > self.length:
            raise SpanError(f"span {span} ends after the context, which has {self.length} tokens")
        index = bisect_right(self.erased, Erased(Span(span.start, span.start + 1), True))
        for entry in self.erased[max(index - 1, 0) :]:
            if entry.span.start >= span.end:
                break
            if entry.span.overlaps(span):
                new = next((placed.span for placed in self.placed if placed.before in entry.span), None)
                hint = "restore that one first" if new is None else f"what replaced it is {new}"
                raise SpanError(f"span {span} overlaps {entry.span}, which is erased already; {hint}")

    def to_cache(self, position: int) -> int:
        """The slot of a ledger position (of the next slot, when its own was removed)."""
        return self._layout.slot(position)

    def span_to_cache(self, span: Span) -> Span:
        """The slots of a live span (one run: nothing inside it is erased or stands elsewhere)."""
        start = self.to_cache(span.start)
        return Span(start, start + len(span))

    def from_cache(self, slots: Span) -> tuple[Span, ...]:
        """The ledger positions of some slots, in the order of the cache."""
        found: list[Span] = []
        layout = self._layout
        index = max(bisect_right(layout.slots, slots.start) - 1, 0)
        for (run, entry), at in zip(layout.runs[index:], layout.slots[index:], strict=False):
            if at >= slots.end:
                break
            first, last = (run.start, run.end) if entry is None else entry.held
            start, end = max(slots.start, at), min(slots.end, at + last - first)
            if start < end:
                here = Span(start, end).shift(first - at)
                if found and found[-1].end == here.start:
                    here = Span(found.pop().start, here.end)
                found.append(here)
        return tuple(found)

    def runs(self) -> Iterator[tuple[Span, Erased | None]]:
        """All positions as runs in the order of the cache, each with its entry where it is erased."""
        return iter(self._layout.runs)

    @property
    def _layout(self) -> _Layout:
        parts, length, known = self._parts, self.length, self._known
        if known is None or known.parts is not parts or known.length != length:
            self._known = known = _Layout(parts, length)
        return known

    def _set_erased(self, entries: Iterable[Erased]) -> None:
        self._parts = (tuple(sorted(entries)), self._parts[1])
