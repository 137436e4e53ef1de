"""Using what of one conversation a request can use: keeping it exactly, or changing it in place.

Knows: held contexts, matches. Does not know how a context was found or what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kveraser.methods import Steering
from kveraser.serving.contexts.blocks import Ids
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.matching import Match

Policy = Literal["exact", "kveraser", "auto"]
"""How edits of a conversation are done: recomputed, steered, or steered and recomputed in idle time."""
Reason = Literal[
    "new", "continued", "branch", "changed", "exact policy", "too little saved", "no room", "residual too large"
]
"""Why a request got the states that it got."""


@dataclass(frozen=True)
class Reuse:
    """What became of a match.

    Attributes:
        method: `prefill` (nothing reused), `prefix`, `full-recompute` or `kveraser`.
        reason: why.
        spans: runs that are changed, in ids of the cached conversation.
        replacements: how many ids stand in the place of each.
        kept: ids of the request, from the beginning, that are in the context now.
        recomputed: tokens that were run to change the runs.
        mended: those of `kept` among them.
        where: runs of the cached conversation that were recomputed in place.
        eraser: as in a receipt.
    """

    method: str
    reason: Reason
    spans: tuple[tuple[int, int], ...] = ()
    replacements: tuple[int, ...] = ()
    kept: int = 0
    recomputed: int = 0
    mended: int = 0
    where: tuple[tuple[int, int], ...] = ()
    eraser: str | None = None


def reuse_exactly(held: HeldContext, found: Match, reason: Reason) -> Reuse:
    """Keep what the request shares with the context from the beginning and is exact; drop the rest.

    Args:
        reason: why what has changed is not changed in place.
    """
    keep = min(found.prefix, held.exact_until)
    as_it_is = not found.changes and keep == found.prefix
    held.context = held.context.prefix(keep, take=True)
    held.residual = 0.0
    return _plain(keep, "continued") if as_it_is else Reuse("full-recompute", reason, *_told(found), kept=keep)


def reuse_copy(keep: int, reason: Reason | None) -> Reuse:
    """A copy of the first ids of a conversation that stays as it is; `reason` as of `reuse_exactly`, if there is any but the policy."""
    return _plain(keep, "branch" if reason is None or reason == "exact policy" else reason)


def _plain(keep: int, reason: Reason) -> Reuse:
    return Reuse("prefix", reason, kept=keep) if keep else Reuse("prefill", "new")


def reuse_in_place(held: HeldContext, found: Match, wanted: Ids, method: Steering) -> Reuse:
    """Change what the request has changed, by steering; keep all else that it shares with the context.

    Raises:
        EraserMismatchError, SpanError, ContextError: edits before the one that failed are made, and what is left behind is not known.
    """
    view, context = held.view, held.context
    if found.kept_until < len(view):  # at the end nothing has read it
        context.erase_spans(view.ledger_spans(found.kept_until, len(view)), method, undo=False)
    if held.exact:
        held.residual = 0.0  # whatever edits had left before it became so
    if not found.changes:
        return Reuse("prefix", "continued", kept=found.new_from)
    before, held.residual = held.residual, None
    gone = [
        span for change in found.changes if not change.added for span in view.ledger_spans(change.start, change.end)
    ]
    receipts = [context.erase_spans(gone, method, undo=False)] if gone else []
    for change in (
        change for change in found.changes if change.added
    ):  # from left to right: new ids see what is before them
        spans, new = view.ledger_spans(change.start, change.end), wanted[change.new_start : change.new_end]
        receipts.append(context.replace_spans(spans, new.tolist(), method, undo=False))
    known = [before, *(receipt.residual for receipt in receipts)]
    held.residual = 0.0 if held.exact else None if None in known else max(map(float, known))  # type: ignore[arg-type]
    where = view.places([run for receipt in receipts for run in receipt.recomputed])
    return Reuse(
        "kveraser",
        "changed",
        *_told(found),
        kept=found.new_from,
        recomputed=sum(receipt.tokens_recomputed for receipt in receipts),
        mended=sum(change.added for change in found.changes) + sum(end - start for start, end in where),
        where=where,
        eraser=receipts[-1].eraser,
    )


def _told(found: Match) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """The changes of a match as they are told."""
    return tuple((c.start, c.end) for c in found.changes), tuple(c.added for c in found.changes)
