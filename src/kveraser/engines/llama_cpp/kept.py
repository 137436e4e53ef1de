"""Copies of cells that an edit replaces, to put them back.

Knows: cells. Does not know why they are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache import Marks
from kveraser.engines.llama_cpp.cells import LIVE, WORK, Cells, States
from kveraser.spans import Span


@dataclass
class KeptCells:
    """What an edit replaced: `in_place` spans, and everything from `layout_from` up to `length`; `marks` before it."""

    length: int
    layout_from: int
    in_place: tuple[Span, ...]
    marks: Marks
    states: States | None

    @classmethod
    def take(cls, cells: Cells, length: int, layout_from: int, in_place: Sequence[Span], marks: Marks) -> KeptCells:
        """Copy what will change."""
        spans = tuple(span for span in in_place if span.end <= layout_from)
        wanted = [*spans, Span(layout_from, length)] if layout_from < length else list(spans)
        return cls(length, layout_from, spans, marks, cells.read(wanted) if wanted else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return 0 if self.states is None else self.states.nbytes

    def put_back(self, cells: Cells) -> None:
        """Bring the cells back, bit for bit; what was added behind them since is dropped."""
        cells.remove(WORK)
        if (end := cells.end(LIVE)) > self.layout_from:
            cells.remove(LIVE, Span(self.layout_from, end))
        for span in self.in_place:
            cells.remove(LIVE, span)
        if self.states is not None:
            cells.write(self.states)

    def put_back_in_place(self, cells: Cells) -> None:
        """The same when only `in_place` spans were replaced and other edits have followed elsewhere."""
        for span in self.in_place:
            cells.remove(LIVE, span)
        if self.states is not None:
            cells.write(self.states)
