"""What is done to cells: steering a span, recomputing behind it, deleting, recomputing all.

Knows: cells, spans of positions, ids. Does not know about ledgers, receipts or undoing; a failure leaves cells missing,
which the caller puts back.

Position and slot are the same here: the live cells are at positions 0, 1, ..., whatever was erased.

    steer           WORK: [window before the span)[span)      adapter on; the new cells become the span's
    rewrite behind  WORK: [window before the gap)[run)        adapter off, at the positions the run would have without the
                                                              gap; then its cells are moved to where the old ones were
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kveraser.cache import Window, window_spans
from kveraser.engines.llama_cpp.cells import BATCH, LIVE, WORK, Cells
from kveraser.errors import OptionError
from kveraser.spans import Span

IdsOf = Callable[[Span], list[int]]
"""The ids of live or just erased slots."""


def check_window(window: Window | None) -> None:
    """Refuse a window that ends before the span: llama.cpp takes no gap right before the tokens it runs."""
    if window is not None and window[0] > 0 and window[1] == 0:
        raise OptionError(
            f"window={window}: llama.cpp needs at least 1 local slot beside the sink, as in ({window[0]}, 1)"
        )


def _show(cells: Cells, window: Window | None, start: int) -> None:
    """Let `WORK` consist of the window's cells before `start`."""
    cells.remove(WORK)
    for run in window_spans(window, start):
        cells.share(LIVE, WORK, run)


def steer(cells: Cells, adapter: Any, ids: Sequence[int], span: Span, window: Window | None) -> None:
    """Re-encode the tokens of `span` with the adapter, into their own positions."""
    _show(cells, window, span.start)
    cells.remove(LIVE, span)  # first, so that the new cells take the very places of the old ones
    with cells.adapter(adapter):
        cells.run(ids, span.start, WORK)
    cells.share(WORK, LIVE, span)
    cells.remove(WORK)


def rewrite_behind(cells: Cells, ids: Sequence[int], gap: Span, runs: Sequence[Span], window: Window | None) -> None:
    """Run the tokens of `runs` again as if the gap before them (and older gaps between them) were not there.

    Their keys are rotated to their positions at the next `settle`.
    """
    _show(cells, window, gap.start)
    for run in runs:
        cells.remove(LIVE, run)
    cells.run(ids, gap.start, WORK)
    at = gap.start + len(ids)
    for run in reversed(runs):  # from behind, so that moved cells never share a position with others
        at -= len(run)
        cells.move(WORK, Span(at, at + len(run)), run.start - at)
    for run in runs:
        cells.share(WORK, LIVE, run)
    cells.remove(WORK)


def delete(cells: Cells, spans: Sequence[Span], length: int) -> None:
    """Drop cells and move up what is behind them; keys are rotated at the next `settle`."""
    for span in reversed(spans):
        cells.remove(LIVE, span)
        if span.end < length:
            cells.move(LIVE, Span(span.end, length), -len(span))
        length -= len(span)


def recompute(cells: Cells, ids: Sequence[int], start: int, length: int, chunk: int = BATCH) -> None:
    """Replace everything from position `start` on (the cells now end at `length`) by freshly run tokens."""
    if start < length:
        cells.remove(LIVE, Span(start, length))
    if ids:
        cells.run(ids, start, LIVE, chunk=min(chunk, BATCH))


class Bench:
    """A small cache beside, of constant size, for passes that see a window only.

    llama.cpp computes attention over every cell in use, seen or not, and rotates all keys of a cache when some are moved.
    Here there is nothing but the window, the span and what is repaired, so that an erase costs the same in any context, and
    no other cell of the user's cache is touched.

    Args:
        cells: the user's cache, whose model and types it has.
        window: `(sink, local)` cells before the span.
        repair: tokens behind the span.
    """

    SPAN = 448
    """Tokens of the longest span it takes; longer ones are steered in the user's cache."""

    def __init__(self, cells: Cells, window: Window, repair: int) -> None:
        self.window, self.repair = window, repair
        self.cells = cells.beside(sum(window) + self.SPAN + repair)

    def fits(self, window: Window | None, span: Span, repair: int) -> bool:
        """Whether a span can be steered here."""
        return (
            window is not None
            and sum(window) <= sum(self.window)
            and len(span) <= self.SPAN
            and repair <= self.repair
            and (span.start == 0 or sum(window) > 0)
        )

    def steer(self, cells: Cells, adapter: Any, ids: Sequence[int], span: Span, window: Window | None) -> None:
        """As `steer`, with the window copied here and the span's cells copied back."""
        self._clear()
        if before := window_spans(window, span.start):
            self.cells.write(cells.read(before))
        with self.cells.adapter(adapter):
            self.cells.run(ids, span.start, LIVE)
        states = self.cells.read([span])
        cells.remove(LIVE, span)
        cells.write(states)

    def rewrite_behind(self, cells: Cells, ids: Sequence[int], gap: Span, runs: Sequence[Span]) -> None:
        """As `rewrite_behind`, right after `steer` of the gap, in the same window."""
        self.cells.remove(LIVE, gap)
        self.cells.run(ids, gap.start, LIVE)
        at = gap.start + len(ids)
        for run in reversed(runs):
            at -= len(run)
            self.cells.move(LIVE, Span(at, at + len(run)), run.start - at)
        self.cells.settle(0)
        states = self.cells.read(runs)
        for run in runs:
            cells.remove(LIVE, run)
        cells.write(states)

    def _clear(self) -> None:
        self.cells.remove(LIVE)
        self.cells.remove(WORK)
