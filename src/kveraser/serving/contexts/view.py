"""The view of a conversation: its ids as a client would send them.

Knows: live ids, placeholders, where each id is in the ledger. Does not know about models, requests or other contexts.

A client may put a placeholder for something it cleared. Where such a span was steered, the view shows the placeholder, and
the conversation is approximate until it is rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kveraser.context import ErasableContext
from kveraser.serving.contexts.matching import Ids
from kveraser.spans import Span


@dataclass(frozen=True, eq=False)
class View:
    """The ids of a conversation as a client would send them; nothing of it can be changed.

    Attributes:
        ids: the ids.
        where: where each of them is: its ledger position, or in a placeholder at ledger position `p`: `-1 - p`.
    """

    ids: Ids
    where: Ids

    @classmethod
    def of(cls, context: ErasableContext, placeholders: Sequence[int], placeholder: Sequence[int]) -> View:
        """The view of a context.

        Args:
            placeholders: ledger positions where a placeholder stands for an erased span, sorted.
            placeholder: ids of one.
        """
        ids = np.asarray(context.live_ids, dtype=np.int64)
        runs = context.live_spans
        where = np.concatenate([np.arange(run.start, run.end) for run in runs] or [ids])
        indices = np.searchsorted(where, placeholders)
        for at, index in zip(reversed(placeholders), reversed(indices.tolist()), strict=True):
            ids = np.insert(ids, index, placeholder)
            where = np.insert(where, index, [-1 - at] * len(placeholder))
        ids.setflags(write=False)
        where.setflags(write=False)
        return cls(ids, where)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def placeholder_starts(self) -> tuple[int, ...]:
        """Where in the view each placeholder begins."""
        inside = np.flatnonzero(self.where < 0)
        begins = [at for at in inside.tolist() if at == 0 or self.where[at - 1] != self.where[at]]
        return tuple(begins)

    def ledger_spans(self, start: int, end: int) -> list[Span]:
        """The runs of consecutive ledger positions in a part of the view."""
        positions = self.where[start:end]
        positions = positions[positions >= 0]
        if not len(positions):
            return []
        edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
        return [Span(int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(edges)]

    def placeholders_in(self, start: int, end: int) -> set[int]:
        """Ledger positions of the placeholders in a part of the view."""
        return {-1 - int(at) for at in self.where[start:end] if at < 0}

    def places(self, spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
        """Where in the view some ledger spans are."""
        chosen = np.zeros(len(self.where), dtype=bool)
        for span in spans:
            chosen |= (self.where >= span.start) & (self.where < span.end)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))).tolist()
        return tuple(zip(edges[::2], edges[1::2], strict=True))
