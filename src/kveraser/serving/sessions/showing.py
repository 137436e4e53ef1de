"""A session in JSON: its ledger, its erases, who has read something.

Knows: contexts, receipts, JSON. Does not know about HTTP; changes nothing.
"""

from __future__ import annotations

from typing import Any

from kveraser.context import ErasableContext, RestoreReport
from kveraser.methods import EraseReceipt
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.sessions.selection import Selection, characters_of, runs_of
from kveraser.spans import Span

MOST_READERS = 128
"""Tokens that are shown as readers of something."""


def show(held: HeldContext) -> dict[str, Any]:
    """The ledger: messages, live and erased runs with their text, erases that can be undone."""
    context = held.context
    new = [span for receipt in context.receipts if receipt.tokens_removed for span in receipt.replacements]
    return {
        "tokens": len(context),
        "live_tokens": sum(map(len, context.live_spans)),
        "exact": held.exact,
        "messages": [
            {"id": message.id, "role": message.role, "span": pair(span), **_said(context, message.content, span)}
            for message, span in context.messages
        ],
        "runs": [{"span": pair(run.span), "state": "live" if run.live else "erased", "text": context.text_of(run.span),
                  "new": run.live and any(run.span.overlaps(span) for span in new)} for run in runs_of(context)],
        "erases": [shown(receipt) for receipt in context.receipts],
        "recomputed": [list(place) for place in characters_of(context, _live_parts(context))],
    }  # fmt: skip


def _said(context: ErasableContext, content: str, span: Span) -> dict[str, Any]:
    """What a message says now."""
    runs = context.standing(span)
    said = content if runs == (span,) else "".join(map(context.text_of, runs))
    return {"content": said, "erased": not runs or any(run.overlaps(gone) for run in runs for gone in context.erased)}


def show_readers(held: HeldContext, selection: Selection) -> dict[str, Any]:
    """Who has read something: the tokens that attended to it most, each with its place and its share of attention."""
    context = held.context
    spans = selection.spans_in(context)
    masses = context.readers(list(spans))
    count = min(MOST_READERS, int((masses > 0).sum()))
    best = masses.topk(count).indices.tolist()
    tokens = [Span(position, position + 1) for position in best]
    places = characters_of(context, tokens)
    total = float(masses.sum())
    return {
        "spans": [pair(span) for span in spans],
        "readers": [
            {
                "span": pair(token),
                "characters": list(place),
                "text": context.text_of(token),
                "read": float(masses[token.start]),
            }
            for token, place in zip(tokens, places, strict=True)
        ],
        "shown": float(masses[best].sum()) / total if total else 1.0,
    }


def pair(span: Span) -> list[int]:
    """A span in JSON."""
    return [span.start, span.end]


def shown(receipt: EraseReceipt) -> dict[str, Any]:
    """A receipt in JSON."""
    return {
        "id": receipt.id,
        "method": receipt.method,
        "spans": [pair(span) for span in receipt.spans],
        "exact": receipt.exact,
        "tokens_removed": receipt.tokens_removed,
        "tokens_recomputed": receipt.tokens_recomputed,
        "recomputed": [pair(span) for span in receipt.recomputed],
        "replacements": [pair(span) for span in receipt.replacements],
        "residual": receipt.residual,
        "eraser": receipt.eraser,
        "notes": list(receipt.notes),
        "seconds": receipt.seconds,
    }


def restored(report: RestoreReport) -> dict[str, Any]:
    """What a restore did, in JSON."""
    return {
        "bit_exact": report.bit_exact,
        "exact": report.exact,
        "seconds": report.seconds,
        "tokens_recomputed": report.tokens_recomputed,
    }


def _live_parts(context: ErasableContext) -> list[Span]:
    """What of the tokens that the erases in effect have recomputed is still live, each part within one run."""
    if context.exact:
        return []
    spans = [span for receipt in context.receipts for span in receipt.recomputed]
    both = [(max(span.start, run.start), min(span.end, run.end)) for span in spans for run in context.live_spans]
    return [Span(start, end) for start, end in both if start < end]
