"""What an erase did, told to its caller.

Knows: slots, token ids. Does not know how an erase is done; `undo` is only carried.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from kveraser.methods.undo import Undo
from kveraser.spans import Span, gaps, union_spans

Ids = TypeVar("Ids", Tensor, list[int], list[list[int]])


@dataclass(frozen=True)
class Put:
    """New ids for the slots `[start, end)` before an edit, maybe none: `ids` `(rows, n)`."""

    start: int
    end: int
    ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids[0])

    def tensor(self, like: Tensor) -> Tensor:
        """The ids for rows `(..., tokens)` as they are given."""
        ids = torch.tensor(self.ids, dtype=like.dtype, device=like.device)
        return ids.expand(*like.shape[:-1], len(self)) if like.ndim > 1 else ids[0]


class OfSpans:
    """What has to do with erased `spans`."""

    spans: tuple[Span, ...]

    @property
    def span(self) -> Span:
        """The erased span; with several, the range from the first to the last."""
        return Span(min(span.start for span in self.spans), max(span.end for span in self.spans))


@dataclass(frozen=True)
class EraseReceipt(OfSpans):
    """What an erase, or a replacement, did, and what is needed to undo it.

    Attributes:
        method: name of the method.
        spans: what was erased, in the order of the cache: cache positions before the edit from `kv.erase`, ledger positions from a
            context.
        exact: whether the *whole* cache now equals a fresh prefill of the tokens that remain.
        tokens_removed: number of erased tokens.
        tokens_recomputed: tokens that were run through the model.
        bytes_written: bytes of keys and values that were computed or moved into the cache.
        seconds: wall-clock time.
        positions_kept: whether every remaining token is still at its old position.
        residual: the share of the attention to the spans that was paid by tokens whose states were not recomputed.
            0.0 when the result is exact, None where nothing was scored.
        recomputed: whose own tokens were run again; cache positions before the edit or ledger positions, like `spans`.
        eraser: "trained" or "neutral", for methods that use an eraser.
        notes: what did not go as asked, and why.
        replacements: where the text is that replaced each of the spans; () for an erase. From a context ledger positions, else cache
            positions after the edit.
        removed, steered: slots (before the edit) that are gone, or hold steering states now.
        stand_ins: steered slots, and the slot whose id is shown in their place.
        puts: new ids, and the slots that they are for; not in a context's receipts.
        id: identifies the edit.
    """

    method: str
    spans: tuple[Span, ...]
    exact: bool
    tokens_removed: int
    tokens_recomputed: int
    bytes_written: int
    seconds: float
    positions_kept: bool
    residual: float | None = None
    recomputed: tuple[Span, ...] = field(default=(), repr=False)
    eraser: str | None = None
    notes: tuple[str, ...] = ()
    replacements: tuple[Span, ...] = ()
    removed: tuple[Span, ...] = field(default=(), repr=False)
    steered: tuple[Span, ...] = field(default=(), repr=False)
    stand_ins: tuple[tuple[Span, int], ...] = field(default=(), repr=False)
    puts: tuple[Put, ...] = field(default=(), repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)
    undo: Undo | None = field(default=None, repr=False, compare=False)

    @property
    def replacement(self) -> Span | None:
        """Where the text is that replaced the span; None for an erase."""
        return self.replacements[0] if self.replacements else None

    def token_ids(self, token_ids: Ids) -> Ids:
        """The ids that go with the cache now, from the ids that went with it before the edit.

        Removed tokens are dropped, new ones are in the place of those that they replaced. Steered slots keep a place, filled with the id
        of the nearest token that is not erased, so that no logits processor or prompt look-up ever sees an erased id.

        Args:
            token_ids: `(tokens,)` or `(batch, tokens)`, a tensor or lists; the same kind is returned.
        """
        if not isinstance(token_ids, Tensor):
            return self.token_ids(torch.as_tensor(token_ids)).tolist()
        ids = token_ids.clone()
        new = [(put, put.tensor(ids)) for put in self.puts]
        for put, given in new:
            count = min(put.end - put.start, len(put))
            ids[..., put.start : put.start + count] = given[..., :count]
            if put.start < put.end < put.start + len(put):
                ids[..., put.end - 1] = given[..., -1]  # for the steered slots right behind
        for span, source in self.stand_ins:
            ids[..., span.slice] = ids[..., source, None]
        taken: list[Span] = [Span(put.start, put.end) for put in self.puts if put.end > put.start]
        kept = gaps(union_spans((*self.removed, *taken)), ids.shape[-1])
        parts = [(run.start, ids[..., run.slice]) for run in kept] + [(put.start, given) for put, given in new]
        found = [part for _, part in sorted(parts, key=lambda part: part[0])]
        return torch.cat(found, -1) if found else ids[..., :0]

    def attention_mask(self, attention_mask: Ids) -> Ids:
        """The attention mask that goes with the cache now, from the one that went with it before the edit."""
        seen = tuple(replace(put, ids=((1,) * len(put),)) for put in self.puts)
        return replace(self, stand_ins=(), puts=seen).token_ids(attention_mask)
