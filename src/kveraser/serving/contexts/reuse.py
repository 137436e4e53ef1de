"""Using what of one conversation a request can use: keeping it exactly, or steering over what was taken out.

Knows: held contexts, matches. Does not know how a context was found or what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kveraser.methods import Steering
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.matching import Match

Policy = Literal["exact", "kveraser", "auto"]
"""How edits of a conversation are done: recomputed, steered, or steered and recomputed in idle time."""


@dataclass(frozen=True)
class Reuse:
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
    spans: tuple[tuple[int, int], ...] = ()
    kept: int = 0
    recomputed: int = 0
    mended: int = 0
    where: tuple[tuple[int, int], ...] = ()
    residual: float | None = None
    eraser: str | None = None


def reuse_exactly(held: HeldContext, found: Match) -> Reuse:
    """Keep what the request shares with the context from the beginning and is exact; drop the rest."""
    keep = min(found.prefix, held.exact_until)
    held.context = held.context.prefix(keep, take=True)
    held.placeholders, held.rebuild = (), None
    spans = tuple((removal.start, removal.end) for removal in found.removals)
    method = "full-recompute" if spans or keep < found.prefix else "prefix" if keep else "prefill"
    return Reuse(method, spans, keep)


def reuse_by_steering(held: HeldContext, found: Match) -> Reuse:
    """Take the removed runs out by steering; keep all else that the request shares with the context.

    Raises:
        EraserMismatchError, SpanError: nothing was changed.
    """
    view = held.view
    runs = [(removal.start, removal.end) for removal in found.removals]
    doomed = [*runs, *([(found.kept_until, len(view))] if found.kept_until < len(view) else [])]
    spans = [span for start, end in doomed for span in view.ledger_spans(start, end)]
    gone = {at for start, end in doomed for at in view.placeholders_in(start, end)}
    firsts = (int(view.where[removal.start]) for removal in found.removals if removal.replaced)
    positions = (set(held.placeholders) - gone) | {max(first, -1 - first) for first in firsts}
    reuse = Reuse("kveraser" if runs else "prefix", tuple(runs), found.new_from)
    if spans:
        receipt = held.context.erase_spans(spans, Steering(), undo=False)
        reuse = replace(
            reuse,
            recomputed=receipt.tokens_recomputed,
            mended=max(receipt.tokens_recomputed - sum(len(span) for span in receipt.steered), 0),
            where=view.places(receipt.recomputed),
            residual=receipt.residual,
            eraser=receipt.eraser,
        )
    held.placeholders = tuple(sorted(positions))
    if doomed:
        held.rebuild = None
    return reuse


def whole_placeholders(held: HeldContext, found: Match) -> Match:
    """The match up to the first place where it would keep or take out a part of a placeholder only."""
    length = len(held.placeholder)
    cuts = {edge for removal in found.removals for edge in (removal.start, removal.end)} | {found.kept_until}
    for start in held.view.placeholder_starts:
        if any(start < cut < start + length for cut in cuts):
            return before(found, start, length)
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
