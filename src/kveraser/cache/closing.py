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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kveraser.cache.marks import Steered
from kveraser.cache.repair import can_close_gaps
from kveraser.errors import UnsupportedCacheError
from kveraser.model_view import causal_lm, view
from kveraser.rope import Rotation, frequencies, rotary_layout
from kveraser.spans import Span

_CLOSING = "kveraser_closing"
_SCORES = 1 << 24
"""Attention scores that are held at a time."""


@dataclass(frozen=True)
class _Block:
    """Slots `[start, end)` (None: to the end of the cache) that a query sees after a turn, or not at all."""

    start: int
    end: int | None
    turn: Rotation | None = None
    shown: bool = True


@dataclass(frozen=True)
class _Gaps:
    """All slots in blocks, and which layers are rotary."""

    blocks: tuple[_Block, ...]
    rotary: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module, gaps: Sequence[Span]) -> _Gaps:
        """From the gaps, in order."""
        inv_freq, layout = frequencies(model), rotary_layout(model)
        blocks: list[_Block] = []
        at, gone = 0, sum(map(len, gaps))
        for gap in gaps:
            if at < gap.start:
                blocks.append(_Block(at, gap.start, Rotation(-gone, inv_freq, layout.pairing)))
            blocks.append(_Block(gap.start, gap.end, shown=False))
            at, gone = gap.end, gone - len(gap)
        return cls((*blocks, _Block(at, None)), tuple(layout.rotary))


_gaps: ContextVar[_Gaps | None] = ContextVar("gaps", default=None)


@contextmanager
def closing_gaps(model: nn.Module, steered: Sequence[Steered], otherwise: nn.Module) -> Iterator[Any]:
    """A view of a model for the block, in which new tokens see what is before hidden spans as if these were not there.

    New tokens are those whose states are appended to the cache; all of them are behind the spans, and there is no padding.

    Args:
        steered: slots that hold steering states, in order. Those of a trained eraser stand in for what was there, and were
            trained to with their gap open: it stays so.
        otherwise: given instead where there is no gap, or none that can be closed.
    """
    gaps = [entry.span for entry in steered if entry.silent]
    if not gaps or not can_close_gaps(model):
        yield otherwise
        return
    token = _gaps.set(_Gaps.of(model, gaps))
    try:
        yield view(causal_lm(model), attention=_CLOSING)
    finally:
        _gaps.reset(token)


def _closing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal softmax attention of the last tokens of a cache, across closed gaps; scores are float32."""
    gaps = _gaps.get()
    assert gaps is not None
    count, size, length = query.shape[2], query.shape[3], key.shape[2]
    scaling = options.get("scaling")
    scaled = query.float() * (size**-0.5 if scaling is None else scaling)
    turns = gaps.rotary[int(module.layer_idx)]  # type: ignore[arg-type]
    blocks = []
    for block in gaps.blocks:
        turned = block.turn(scaled) if block.turn is not None and turns else scaled
        blocks.append((turned, key[:, :, block.start : block.end].float().transpose(-1, -2), block.shown))
    rows = max(_SCORES // (query.shape[1] * length), 1)
    parts = [_rows(slice(a, min(a + rows, count)), count, blocks, value) for a in range(0, count, rows)]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return found.transpose(1, 2).to(query.dtype), None


def _rows(rows: slice, count: int, blocks: Sequence[tuple[Tensor, Tensor, bool]], value: Tensor) -> Tensor:
    """The output `(batch, heads, rows, head_dim)` of some of `count` new tokens."""
    batch, groups, length, size = value.shape
    heads, some = blocks[0][0].shape[1], rows.stop - rows.start
    scores = []
    for query, keys, shown in blocks:
        if shown:
            scores.append(query[:, :, rows].reshape(batch, groups, -1, size) @ keys)
        else:
            scores.append(query.new_full((batch, groups, heads // groups * some, keys.shape[-1]), -torch.inf))
    found = torch.cat(scores, -1).view(batch, heads, some, length)
    if count > 1:
        own = torch.arange(rows.start, rows.stop, device=value.device)[:, None]
        later = torch.arange(count, device=value.device)[None] > own
        found[..., length - count :].masked_fill_(later, -torch.inf)
    weights = found.softmax(-1).to(value.dtype).view(batch, groups, -1, length)
    return (weights @ value).view(batch, heads, some, size)


AttentionInterface.register(_CLOSING, _closing_attention)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """What tokens see is told by the gaps; padding is not among it."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedCacheError(
            "padded rows cannot be read across closed gaps; run the model itself, which leaves the gap open, or erase with "
            "attention-guided-repair, which leaves none"
        )


AttentionMaskInterface.register(_CLOSING, _no_mask)
