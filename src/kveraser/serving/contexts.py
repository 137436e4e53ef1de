"""One context as the server holds it, and using what a request can use of it.

Knows: `ErasableContext`, matches. Does not know about HTTP, queues, files or other contexts.

The *view* of a cached conversation is its ids as a client would send them: the live ids, and a placeholder wherever the
client put one for a span that was steered. A context with a placeholder in its view is approximate until it is rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from kveraser.cache import GrowableLayer, get_marks
from kveraser.context import ErasableContext
from kveraser.methods import EraseReceipt, Steering
from kveraser.serving.matching import Ids, Match
from kveraser.spans import Span


@dataclass
class Held:
    """A context in memory.

    Attributes:
        id: names it, also on disk.
        owner: digest of the API key it belongs to.
        explicit: made through the session API; else a cached conversation.
        context: the context itself.
        placeholders: ledger positions where a placeholder stands for an erased span, sorted.
        prompt_end: length of the view before the last prompt's last token was read: what follows may be dropped, since a
            client that asks again gets a new reply.
        repair: whether to make it exact in idle time.
        receipts: of an explicit session's erases, by id.
        rebuild: an exact copy in the making, beside the context that goes on being used.
    """

    id: str
    owner: str
    explicit: bool
    context: ErasableContext
    placeholders: tuple[int, ...] = ()
    prompt_end: int = 0
    repair: bool = False
    receipts: dict[str, EraseReceipt] = field(default_factory=dict)
    rebuild: ErasableContext | None = None

    @property
    def exact(self) -> bool:
        """Whether the context equals a fresh prefill of its view."""
        return self.context.exact and not self.placeholders

    @property
    def bytes(self) -> int:
        """Memory taken by keys and values, room to spare included, and by the exact copy that idle time will make."""
        return context_bytes(self.context) * (2 if self.repair and not self.exact else 1)

    def view(self, placeholder: tuple[int, ...]) -> tuple[Ids, Ids]:
        """The ids as a client would send them, and where each is: its ledger position, or in a placeholder at ledger
        position `p`: `-1 - p`."""
        live = np.asarray(self.context.live_ids, dtype=np.int64)
        runs = self.context.live_spans
        where = np.concatenate([np.arange(run.start, run.end) for run in runs] or [live])
        indices = np.searchsorted(where, self.placeholders)
        for at, index in zip(reversed(self.placeholders), reversed(indices.tolist()), strict=True):
            live = np.insert(live, index, placeholder)
            where = np.insert(where, index, [-1 - at] * len(placeholder))
        return live, where

    def exact_until(self, placeholder: tuple[int, ...]) -> int:
        """How many ids of the view, from the beginning, equal a fresh prefill."""
        ids, where = self.view(placeholder)
        first = np.flatnonzero(where < 0)
        known = get_marks(self.context.cache).approximate_from
        limits = [len(ids), *(first[:1].tolist()), *([] if known is None else [known])]
        return int(min(limits))


def context_bytes(context: ErasableContext) -> int:
    """Memory of a context's keys and values, room to spare included."""
    total = 0
    for layer in context.cache.layers:
        assert isinstance(layer, GrowableLayer)
        if layer.keys is not None:
            batch, heads, _, size = layer.keys.shape
            total += 2 * batch * heads * size * layer.capacity * layer.keys.element_size()
    return total


@dataclass(frozen=True)
class Reused:
    """What became of a match.

    Attributes:
        method: `prefill` (nothing reused), `prefix`, `full-recompute` or `kveraser`.
        spans: runs taken out, in ids of the cached conversation.
        kept: ids of the request, from the beginning, that are in the context now.
        recomputed: tokens that were run to take the runs out.
        mended: those of `kept` among them.
        where: runs of the cached conversation that were recomputed in place.
        residual, eraser: of the erase, as in its receipt.
    """

    method: str
    spans: tuple[tuple[int, int], ...]
    kept: int
    recomputed: int = 0
    mended: int = 0
    where: tuple[tuple[int, int], ...] = ()
    residual: float | None = None
    eraser: str | None = None


def reuse_exactly(held: Held, found: Match, placeholder: tuple[int, ...]) -> Reused:
    """Keep what the request shares with the context from the beginning and is exact; drop the rest."""
    keep = min(found.prefix, held.exact_until(placeholder))
    held.context = held.context.prefix(keep, take=True)
    held.placeholders, held.rebuild = (), None
    spans = tuple((removal.start, removal.end) for removal in found.removals)
    method = "full-recompute" if spans or keep < found.prefix else "prefix" if keep else "prefill"
    return Reused(method, spans, keep)


def reuse_by_steering(held: Held, found: Match, placeholder: tuple[int, ...]) -> Reused:
    """Take the removed runs out by steering; keep all else that the request shares with the context.

    Raises:
        EraserMismatchError, SpanError: nothing was changed.
    """
    ids, where = held.view(placeholder)
    runs = [(removal.start, removal.end) for removal in found.removals]
    doomed = [*runs, *([(found.kept_until, len(ids))] if found.kept_until < len(ids) else [])]
    spans = [span for start, end in doomed for span in _ledger_spans(where[start:end])]
    gone = {-1 - int(at) for start, end in doomed for at in where[start:end] if at < 0}
    firsts = (int(where[removal.start]) for removal in found.removals if removal.replaced)
    positions = (set(held.placeholders) - gone) | {max(first, -1 - first) for first in firsts}
    recomputed = mended = 0
    receipt = None
    if spans:
        receipt = held.context.erase_spans(spans, Steering(), undo=False)
        recomputed = receipt.tokens_recomputed
        mended = max(recomputed - sum(len(span) for span in receipt.steered), 0)
    held.placeholders = tuple(sorted(positions))
    if doomed:
        held.rebuild = None
    again = () if receipt is None else _places(where, receipt.recomputed)
    left, eraser = (None, None) if receipt is None else (receipt.residual, receipt.eraser)
    method = "kveraser" if runs else "prefix"
    return Reused(method, tuple(runs), found.new_from, recomputed, mended, again, left, eraser)


def whole_placeholders(held: Held, found: Match, placeholder: tuple[int, ...]) -> Match:
    """The match up to the first place where it would keep or take out a part of a placeholder only."""
    _, where = held.view(placeholder)
    runs = np.flatnonzero(where < 0)
    cuts = {edge for removal in found.removals for edge in (removal.start, removal.end)} | {found.kept_until}
    for start in runs[:: len(placeholder)].tolist() if len(placeholder) else ():
        end = start + len(placeholder)
        if any(start < cut < end for cut in cuts):
            return before(found, start, len(placeholder))
    return found


def before(found: Match, position: int, placeholder_length: int) -> Match:
    """What of a match keeps cached ids before `position` only."""
    if position >= found.kept_until:
        return found
    removals = [removal for removal in found.removals if removal.end < position]
    crossing = [removal for removal in found.removals if removal.start <= position <= removal.end]
    end = crossing[0].start if crossing else position
    while removals and removals[-1].end >= end:
        end = removals.pop().start
    gone = sum(removal.end - removal.start for removal in removals)
    added = sum(placeholder_length for removal in removals if removal.replaced)
    return replace(found, removals=tuple(removals), kept_until=end, new_from=end - gone + added)


def _places(where: Ids, spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    """Where in a view some ledger spans are."""
    chosen = np.zeros(len(where), dtype=bool)
    for span in spans:
        chosen |= (where >= span.start) & (where < span.end)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _ledger_spans(where: Ids) -> list[Span]:
    """The runs of consecutive ledger positions in a part of a view."""
    positions = where[where >= 0]
    if not len(positions):
        return []
    edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return [Span(int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(edges)]
