"""Where the slots of an edit lie: what stays, what is new, what nobody is to see any more.

Knows: spans, marks, token counts. Does not know what an edit does, or backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kveraser.cache import Marks, Tokens
from kveraser.methods.slots import neighbors, with_slots
from kveraser.spans import Span


class Lying:
    """What follows from the spans of an edit; its attributes are described there."""

    tokens: Tokens
    spans: tuple[Span, ...]
    marks: Marks
    new: tuple[int, ...]
    blank: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Number of slots before the edit."""
        return self.tokens.length

    @property
    def kept(self) -> Tensor:
        """The slots with tokens that stay, `(n,)` int64: neither steered nor to be erased."""
        stays = torch.ones(self.length, dtype=torch.bool, device=self.tokens.ids.device)
        for span in (*self.spans, *self.marks.steered_spans):
            stays[span.slice] = False
        return stays.nonzero()[:, 0]

    @property
    def fresh(self) -> tuple[Span, ...]:
        """The slots of the new tokens."""
        return tuple(
            Span(span.start, span.start + count) for span, count in zip(self.spans, self.new, strict=False) if count
        )

    @property
    def spare(self) -> tuple[Span, ...]:
        """The slots of the spans that no new token takes: to be dropped or hidden. In an erase, the spans."""
        counts = self.new or (0,) * len(self.spans)
        return tuple(Span(s.start + n, s.end) for s, n in zip(self.spans, counts, strict=True) if n < len(s))

    @property
    def said(self) -> tuple[Span, ...]:
        """What of the spans held tokens before the edit: without the room that was made at their ends."""
        room = {span.end: len(span) for span in self.blank}
        return tuple(Span(span.start, span.end - room.get(span.end, 0)) for span in self.spans)

    @property
    def growth(self) -> int:
        """For how many new tokens the spans have no slots."""
        return sum(max(count - len(span), 0) for span, count in zip(self.spans, self.new, strict=False))

    @property
    def after(self) -> Tensor:
        """The slots that hold tokens after the edit, `(n,)` int64: what stays and what is new, as they lie now."""
        return with_slots(self.kept, self.fresh)

    @property
    def absent(self) -> tuple[Span, ...]:
        """The slots that nobody is to see any more, in order: what of the spans is dropped or hidden, and what was hidden before."""
        return tuple(sorted((*self.spare, *self.marks.steered_spans)))

    def neighbors(self, counts: Sequence[int]) -> list[tuple[Span, tuple[Span, ...]]]:
        """For each of the spans, the first live slots behind it, so many (none beyond the next one), as disjoint runs."""
        return neighbors(self.spans, self.marks.steered_spans, self.length, counts)

    def runs_behind(self, counts: Sequence[int]) -> tuple[Span, ...]:
        """The first live slots behind each of the spans, so many of each, as disjoint runs in order."""
        return tuple(run for _, runs in self.neighbors(counts) for run in runs)
