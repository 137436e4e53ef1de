"""Running new tokens behind hidden spans as if these had left no gap.

Knows: gaps, rotary embeddings, attention. Does not know why there are gaps, or what the new tokens are for.

What stays in place leaves a gap of the span's length between what was before it and whatever comes later. Attention depends on
relative positions, so the gap can be closed without moving a key: a new token's query is turned back, in float32 and without
being rounded again, for the slots before each gap (as for tokens that are run again, see `repair`). All new tokens are behind all
gaps, so each block of slots has one turn. Neutral states, which are there not to be attended to, are not shown at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kveraser.cache.marks import Steered
from kveraser.cache.repair import can_close_gaps
from kveraser.errors import UnsupportedCacheError
from kveraser.model.attention import blockwise_attention, check_plain_scores
from kveraser.model.rope import Rotation, frequencies, rotary_layout
from kveraser.model.view import causal_lm, view
from kveraser.spans import Span

_CLOSING = "kveraser_closing"


@dataclass(frozen=True)
class Gaps:
    """Hidden spans in order, the turns of the queries for the slots between them, and which layers are rotary.

    `turns` are of the slots up to the end of each span; for those behind the last one queries stay as they are.
    """

    spans: tuple[Span, ...]
    turns: tuple[Rotation, ...]
    rotary: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module, steered: Sequence[Steered]) -> Gaps | None:
        """From slots that hold steering states, in order; None where there is no gap, or none that can be closed.

        The states of a trained eraser stand in for what was there, and were trained to with their gap open: it stays so.
        """
        spans = [entry.span for entry in steered if entry.silent]
        if not spans or not can_close_gaps(model):
            return None
        inv_freq, layout = frequencies(model), rotary_layout(model)
        gone = list(accumulate(map(len, reversed(spans))))[::-1]  # positions from each span on
        turns = tuple(Rotation(-positions, inv_freq, layout.pairing) for positions in gone)
        return cls(tuple(spans), turns, tuple(layout.rotary))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """Causal softmax attention of the last tokens of a cache; scores are float32.

        Args:
            query: `(batch, heads, tokens, head_dim)`.
            key, value: `(batch, kv_heads, slots, head_dim)`, those of the tokens the last ones.
            layer: which layer of the model this is.

        Returns:
            `(batch, tokens, heads, head_dim)`, in the type of the queries.
        """
        count = query.shape[2]
        own = torch.arange(count, device=query.device)

        def hide(scores: Tensor, rows: slice) -> None:
            for span in self.spans:
                scores[..., span.slice] = -torch.inf
            if count > 1:
                scores[..., -count:].masked_fill_(own > own[rows, None], -torch.inf)

        blocks = self._blocks(query.float() * scaling, key.float(), self.rotary[layer])
        return blockwise_attention(blocks, value, hide).transpose(1, 2).to(query.dtype)

    def _blocks(self, query: Tensor, keys: Tensor, rotary: bool) -> list[tuple[Tensor, Tensor]]:
        """The queries for each block of slots, and its keys."""
        found, at = [], 0
        for span, turn in zip(self.spans, self.turns, strict=True):
            found.append((turn(query) if rotary else query, keys[:, :, at : span.end]))
            at = span.end
        return [*found, (query, keys[:, :, at:])]


_gaps: ContextVar[Gaps | None] = ContextVar("gaps", default=None)


@contextmanager
def closing_gaps(model: nn.Module, steered: Sequence[Steered], otherwise: nn.Module) -> Iterator[Any]:
    """A view of a model for the block, in which new tokens see what is before hidden spans as if these were not there.

    New tokens are those whose states are appended to the cache; all of them are behind the spans, and there is no padding.

    Args:
        steered: slots that hold steering states, in order.
        otherwise: given instead where there is no gap, or none that can be closed.
    """
    gaps = Gaps.of(model, steered)
    if gaps is None:
        yield otherwise
        return
    token = _gaps.set(gaps)
    try:
        yield view(causal_lm(model), attention=_CLOSING)
    finally:
        _gaps.reset(token)


def _closing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of the last tokens of a cache, across closed gaps.

    Raises:
        UnsupportedCacheError: scores that are not those of plain softmax attention.
    """
    check_plain_scores(
        module,
        options,
        "nothing can be read across closed gaps; restore the erase, and use full-recompute or delete-and-shift, which leave none",
    )
    gaps = _gaps.get()
    assert gaps is not None
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return gaps.attend(query, key, value, scaling, int(module.layer_idx)), None  # type: ignore[arg-type]


AttentionInterface.register(_CLOSING, _closing_attention)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """What tokens see is told by the gaps; padding is not among it."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedCacheError(
            "padded rows cannot be read across closed gaps; run the model itself, which leaves the gap open, or erase with "
            "attention-guided-repair, which leaves none"
        )


AttentionMaskInterface.register(_CLOSING, _no_mask)
