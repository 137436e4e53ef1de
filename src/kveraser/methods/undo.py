"""What is needed to undo an edit: the states that it replaced.

Knows: caches, slots, marks. Does not know what the edit was, or when undoing it is right (see `putting_back.py` and contexts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from kveraser.cache import Marks, States, append, cache_length, set_marks, snapshots, truncate, write_all
from kveraser.spans import Span, gaps


@dataclass
class Undo:
    """The states an edit replaced. Lives as long as its receipt; `clear()` overwrites and frees them."""

    length: int
    layout_from: int
    marks: Marks
    regions: list[tuple[Span, States]]
    cleared: bool = False

    @classmethod
    def take(cls, cache: Cache, marks: Marks, layout_from: int, in_place: Sequence[Span] = ()) -> Undo:
        """Copy what will change: all slots from `layout_from` on, which may move, and some before it."""
        length = cache_length(cache)
        spans = [span for span in in_place if span.end <= layout_from]
        if layout_from < length:
            spans.append(Span(layout_from, length))
        return cls(length, layout_from, marks, list(zip(spans, snapshots(cache, spans), strict=True)))

    def put_back(self, cache: Cache) -> None:
        """Bring the cache back to what it was, bit for bit; slots that were added later are dropped."""
        truncate(cache, self.layout_from)
        write_all(cache, [region for region in self.regions if region[0].start != self.layout_from])
        for span, states in self.regions:
            if span.start == self.layout_from:
                append(cache, states)
        set_marks(cache, self.marks)

    @property
    def kept(self) -> tuple[Span, ...]:
        """The slots whose states are kept."""
        return tuple(span for span, _ in self.regions)

    @property
    def nbytes(self) -> int:
        """Memory of the kept states."""
        return sum(tensor.nbytes for _, states in self.regions for pair in states for tensor in pair)

    def states_of(self, span: Span) -> States:
        """The kept states of some slots, all of one region."""
        region, states = next((r, s) for r, s in self.regions if r.start <= span.start and span.end <= r.end)
        part = slice(span.start - region.start, span.end - region.start)
        return [(keys[:, :, part], values[:, :, part]) for keys, values in states]

    def adopt(self, span: Span, states: States) -> None:
        """Keep other states for some slots, instead of or besides those that are kept."""
        for region, own in self.regions:
            a, b = max(region.start, span.start), min(region.end, span.end)
            if a >= b:
                continue
            for mine, theirs in zip(own, states, strict=True):
                for old, new in zip(mine, theirs, strict=True):
                    with torch.inference_mode(old.is_inference()):
                        old[:, :, a - region.start : b - region.start] = new[:, :, a - span.start : b - span.start]
        for run in gaps(sorted(own for own in self.kept if own.overlaps(span)), span.end, span.start):
            part = slice(run.start - span.start, run.end - span.start)
            self.regions.append(
                (run, [(keys[:, :, part].clone(), values[:, :, part].clone()) for keys, values in states])
            )

    def clear(self) -> None:
        """Overwrite the kept states with zeros and let go of them."""
        copies = [tensor.untyped_storage() for _, states in self.regions for pair in states for tensor in pair]
        for storage in {copy.data_ptr(): copy for copy in copies}.values():  # regions share them
            storage.fill_(0)  # type: ignore[attr-defined]
        self.regions, self.cleared = [], True
