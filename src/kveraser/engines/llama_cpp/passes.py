"""What is done to cells: running a stretch again, recomputing behind a gap, deleting.

Knows: cells, spans of positions, ids. Does not know about ledgers, receipts or undoing; a failure leaves cells missing,
which the caller puts back.

Position and slot are the same here: the live cells are at positions 0, 1, ..., whatever was erased.

    rewrite         WORK: [what is shown before the span)[span)      with an adapter or without; the new cells become the span's
    right behind    WORK: [what is shown before the gap)[span)       at the positions it would have without the gap; then its
    a gap                                                            cells are moved to where the old ones were
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kveraser.engines.llama_cpp.cells import LIVE, WORK, Cells
from kveraser.spans import Span


def _show(cells: Cells, shown: Sequence[Span]) -> None:
    """Let `WORK` consist of some live cells."""
    cells.remove(WORK)
    for run in shown:
        cells.share(LIVE, WORK, run)


def rewrite(cells: Cells, adapter: Any, ids: Sequence[int], span: Span, shown: Sequence[Span]) -> None:
    """Run the tokens of `span` again, with an adapter or (None) without, into their own positions.

    Where there is a gap right before them they are run as if there were none, and their keys are turned to their positions
    (llama.cpp takes no gap before the tokens it decodes). Gaps further back stay as they are, and no key is turned.
    """
    _show(cells, shown)
    cells.remove(LIVE, span)  # first, so that the new cells take the very places of the old ones
    start = cells.end(WORK) or span.start
    with cells.adapter(adapter):
        cells.run(ids, start, WORK)
    if start != span.start:
        cells.turn_work(start, span.start - start)
    cells.share(WORK, LIVE, span)
    cells.remove(WORK)


def rewrite_runs(cells: Cells, ids: Sequence[int], runs: Sequence[Span], shown: Sequence[Span]) -> None:
    """Run some runs of tokens again, one after the other: each sees what is shown before it, and the earlier ones as they are then."""
    at = 0
    for run in runs:
        seen = [Span(part.start, min(part.end, run.start)) for part in shown if part.start < run.start]
        rewrite(cells, None, ids[at : at + len(run)], run, seen)
        at += len(run)


def _run_closed(cells: Cells, sequence: int, ids: Sequence[int], gap: Span, runs: Sequence[Span]) -> None:
    """Run tokens from where a gap begins, and move their cells to where `runs` are."""
    cells.run(ids, gap.start, sequence)
    at = gap.start + len(ids)
    for run in reversed(runs):  # from behind, so that moved cells never share a position with others
        at -= len(run)
        cells.move(sequence, Span(at, at + len(run)), run.start - at)


def delete(cells: Cells, spans: Sequence[Span], length: int) -> None:
    """Drop cells and move up what is behind them; keys are rotated at the next `settle`."""
    for span in reversed(spans):
        cells.remove(LIVE, span)
        if span.end < length:
            cells.move(LIVE, Span(span.end, length), -len(span))
        length -= len(span)


class Bench:
    """A small cache beside, of constant size, for passes that see a window only.

    llama.cpp computes attention over every cell in use, seen or not, and rotates all keys of a cache when some are moved.
    Here there is nothing but the window, the span and what is repaired, so that an erase costs the same in any context, and
    no other cell of the user's cache is touched.

    Args:
        cells: the user's cache, whose model and types it has.
        shown: cells before the span.
        repair: tokens behind the span.
    """

    SPAN = 448
    """Tokens of the longest span it takes; longer ones are steered in the user's cache."""

    def __init__(self, cells: Cells, shown: int, repair: int) -> None:
        self.shown, self.repair = shown, repair
        self.cells = cells.beside(shown + self.SPAN + repair)

    def rewrite(self, cells: Cells, adapter: Any, ids: Sequence[int], span: Span, shown: Sequence[Span]) -> None:
        """As `rewrite`, with what is shown copied here and the span's cells copied back."""
        self.cells.remove(LIVE)
        self.cells.remove(WORK)
        if shown:
            self.cells.write(cells.read(shown))
        with self.cells.adapter(adapter):
            self.cells.run(ids, span.start, LIVE)
        self._hand_over(cells, [span])

    def rewrite_behind(self, cells: Cells, ids: Sequence[int], gap: Span, runs: Sequence[Span]) -> None:
        """Run tokens right behind a gap, in a window, as if it and older gaps between them were not there; right after `rewrite` of
        the gap's end, whose window is shown."""
        self.cells.remove(LIVE, gap)
        _run_closed(self.cells, LIVE, ids, gap, runs)
        self.cells.settle(0)
        self._hand_over(cells, runs)

    def _hand_over(self, cells: Cells, runs: Sequence[Span]) -> None:
        states = self.cells.read(runs)
        for run in runs:
            cells.remove(LIVE, run)
        cells.write(states)
