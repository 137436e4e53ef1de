"""The view of a conversation: its ids as a client would send them.

Knows: live ids, where each of them is in the ledger. Does not know about models, requests or other contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kveraser.context import ErasableContext
from kveraser.serving.contexts.blocks import Ids
from kveraser.spans import Span


@dataclass(frozen=True, eq=False)
class View:
    """The ids of a conversation as a client would send them; nothing of it can be changed.

    Attributes:
        ids: the ids.
        where: the ledger position of each of them.
    """

    ids: Ids
    where: Ids

    @classmethod
    def of(cls, context: ErasableContext) -> View:
        """The view of a context."""
        ids = np.asarray(context.live_ids, dtype=np.int64)
        where = np.concatenate([np.arange(run.start, run.end) for run in context.live_spans] or [ids])
        ids.setflags(write=False)
        where.setflags(write=False)
        return cls(ids, where)

    def __len__(self) -> int:
        return len(self.ids)

    def ledger_spans(self, start: int, end: int) -> list[Span]:
        """The runs of consecutive ledger positions in a part of the view."""
        positions = self.where[start:end]
        if not len(positions):
            return []
        edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
        return [Span(int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(edges)]

    def places(self, spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
        """Where in the view some ledger spans are."""
        chosen = np.zeros(len(self.where), dtype=bool)
        for span in spans:
            chosen |= (self.where >= span.start) & (self.where < span.end)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))).tolist()
        return tuple(zip(edges[::2], edges[1::2], strict=True))
