"""What is needed to undo an edit: the states that it replaced.

Knows: backends, slots, marks. Does not know what the edit was, or when undoing it is right (see `putting_back.py` and contexts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from kveraser.cache import Backend, Kept, Marks
from kveraser.interrupts import uninterrupted
from kveraser.spans import Span, gaps


@dataclass
class Undo:
    """The states an edit replaced. Lives as long as its receipt; `clear()` overwrites and frees them."""

    length: int
    layout_from: int
    marks: Marks
    regions: list[tuple[Span, Kept]]
    cleared: bool = False

    @classmethod
    def take(cls, backend: Backend, marks: Marks, layout_from: int, in_place: Sequence[Span] = ()) -> Undo:
        """Copy what will change: all slots from `layout_from` on, which may move, and some before it."""
        length = backend.length
        spans = [span for span in in_place if span.end <= layout_from]
        if layout_from < length:
            spans.append(Span(layout_from, length))
        return cls(length, layout_from, marks, list(zip(spans, backend.take_all(spans), strict=True)))

    def put_back(self, backend: Backend) -> None:
        """Bring the cache back to what it was, bit for bit; slots that were added later are dropped."""
        backend.crop(self.layout_from)
        backend.put_all(self.regions)
        backend.marks = self.marks

    @property
    def kept(self) -> tuple[Span, ...]:
        """The slots whose states are kept."""
        return tuple(span for span, _ in self.regions)

    @property
    def nbytes(self) -> int:
        """Memory of the kept states."""
        return sum(states.nbytes for _, states in self.regions)

    def states_of(self, span: Span) -> Kept:
        """The kept states of some slots, all of one region."""
        region, states = next((r, s) for r, s in self.regions if r.start <= span.start and span.end <= r.end)
        return states.part(slice(span.start - region.start, span.end - region.start))

    def adopt(self, span: Span, states: Kept) -> None:
        """Keep other states for some slots, instead of or besides those that are kept."""

        def part(of: Kept, start: int, a: int, b: int) -> Kept:
            return of.part(slice(a - start, b - start))

        for region, own in self.regions:
            a, b = max(region.start, span.start), min(region.end, span.end)
            if a < b:
                part(own, region.start, a, b).overwrite(part(states, span.start, a, b))
        for run in gaps(sorted(own for own in self.kept if own.overlaps(span)), span.end, span.start):
            self.regions.append((run, part(states, span.start, run.start, run.end).copy()))

    def clear(self) -> None:
        """Overwrite the kept states with zeros and let go of them."""
        for _, states in self.regions:
            states.clear()
        self.regions, self.marks, self.cleared = [], Marks(), True


@contextmanager
def put_back_on_failure(
    backend: Backend, marks: Marks, layout_from: int, in_place: Sequence[Span] = ()
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Bring the cache back to what it was if the block fails or is interrupted.

    The block is given `committing`: what its caller has besides the cache is to be changed at the end of it, within `committing()`,
    which nothing interrupts and after which nothing is brought back.

    Args:
        layout_from, in_place: as of `Undo.take`, what the block may change.
    """
    saved = Undo.take(backend, marks, layout_from, in_place)
    committed = False

    @contextmanager
    def committing() -> Iterator[None]:
        nonlocal committed
        with uninterrupted():
            yield
            committed = True

    try:
        yield committing
    except BaseException:
        if not committed:
            with uninterrupted():
                saved.put_back(backend)
        raise
