"""How much of its attention a token gave to the slots of a span.

Knows: queries, keys, softmax. Does not know where the queries come from or what is done with the masses.

A softmax over the whole context would cost a pass of the model. Over the first slots (the attention sink), the nearest 64
and the span itself it ranks tokens as well; what is left out of the denominator is estimated from some hundred sampled
slots, so that the masses of distant tokens are not overstated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

SINK = 4
NEAR, FEW_NEAR = 64, 16
SAMPLES, FEW_SAMPLES = 256, 64
_NEVER = -torch.inf
_LOWEST = -1e30


@dataclass(frozen=True)
class Landscape:
    """What the tokens of one row may have attended to.

    Attributes:
        live: `(slots,)` bool: no padding, nothing erased earlier. The span's own slots are live.
        span: `(n,)` slots of the span (or spans).
        sink: `(SINK,)` or fewer, the first live slots outside of the span.
        samples: `(m,)` slots drawn evenly from what is neither.
        between: `(slots + 1,)`, how many live slots outside of span and sink there are before each slot.
        near: how many slots up to a token count as the nearest.
    """

    live: Tensor
    span: Tensor
    sink: Tensor
    samples: Tensor
    between: Tensor
    near: int = NEAR

    @property
    def columns(self) -> int:
        """How many scores a token gets."""
        return len(self.span) + len(self.sink) + len(self.samples) + self.near

    def thinned(self) -> Landscape:
        """With fewer samples and fewer near slots, for a look at many tokens."""
        return replace(self, samples=self.samples[:: SAMPLES // FEW_SAMPLES], near=FEW_NEAR)

    @classmethod
    def of(cls, live: Tensor, span: Tensor) -> Landscape:
        """From the live slots and those of the span."""
        rest = live.clone()
        rest[span] = False
        others = rest.nonzero()[:, 0]
        sink, others = others[:SINK], others[SINK:]
        count = min(SAMPLES, len(others))
        places = torch.linspace(0, len(others) - 1, count, device=live.device, dtype=torch.float64).round().long()
        rest[sink] = False
        return cls(live, span, sink, others[places], F.pad(rest.long().cumsum(0), (1, 0)))


def span_mass(
    queries: Tensor,
    slots: Tensor,
    keys: Tensor,
    scaling: float,
    land: Landscape,
    *,
    run: bool,
    key_heads: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The share of their attention that tokens gave to the span, per head.

    Args:
        queries: `(heads, tokens, head_dim)`, rotated, in the type to compute in.
        slots: `(tokens,)`, where the tokens are.
        keys: `(kv_heads, slots, head_dim)` of the layer.
        run: whether the slots are consecutive, which is faster.
        key_heads: the key head of each query head; None: as many query heads as there are for each key head, in order.

    Returns:
        Masses `(heads, tokens)`, and the logarithm of the denominators, `(heads, tokens)`; both float32.
    """
    heads, count, size = queries.shape
    which = range(keys.shape[0]) if key_heads is None else key_heads
    groups = len(which)
    grouped = (queries * scaling).to(keys.dtype).reshape(groups, heads // groups * count, size)
    samples = land.samples[land.samples <= slots.max() - land.near]  # what is behind all tokens tells nothing
    columns = torch.cat([land.span, land.sink, samples])
    parts = [len(land.span), len(land.sink), len(samples)]
    seen_from = torch.cat([land.span + 1, land.sink, samples + land.near])
    scores = (grouped @ _some(keys.index_select(1, columns), which).transpose(-1, -2)).view(heads, count, -1).float()
    partly = (seen_from > slots.min()).nonzero()[:, 0]
    if len(partly):
        first = int(partly[0])
        scores[..., first:].masked_fill_(seen_from[first:] > slots[:, None], _NEVER)
    largest = _exponentials(scores)
    span, sink, drawn = (part.sum(-1) for part in scores.split(parts, -1))
    distant = torch.searchsorted(samples, slots - land.near, right=True)
    stand_for = land.between[(slots - land.near + 1).clamp(min=0)].float() / distant.clamp(min=1)
    seen = (span + sink + drawn * stand_for.clamp(min=1)).log() + largest
    near = (_near_run if run else _near)(grouped, slots, keys, land, which)
    near = near.reshape(heads, count)
    whole = torch.logaddexp(seen, near)
    whole.masked_fill_(whole.isneginf(), torch.inf)  # padding sees nothing, and gives nothing
    return span * (largest - whole).exp(), whole


def _exponentials(scores: Tensor) -> Tensor:
    """Turn scores `(..., columns)` into weights, in place; returns the logarithm `(...)` of what they are to be multiplied by."""
    largest = scores.amax(-1).clamp(min=_LOWEST)
    scores.sub_(largest[..., None]).exp_()
    return largest


def _log_sum(scores: Tensor) -> Tensor:
    """Log of the summed weights of scores `(..., columns)`, which are overwritten."""
    largest = _exponentials(scores)
    return scores.sum(-1).log() + largest


def _some(keys: Tensor, which: Sequence[int]) -> Tensor:
    """Some of the key heads, without a copy where it is all of them."""
    return keys if tuple(which) == tuple(range(len(keys))) else keys[list(which)]


def _countable(columns: Tensor, land: Landscape) -> Tensor:
    """Which of the slots count as near ones: live, and in no other part of the denominator."""
    marked = land.live.clone()
    marked[land.span] = False
    marked[land.sink] = False
    return marked[columns.clamp(min=0)] & (columns >= 0)


def _near(grouped: Tensor, slots: Tensor, keys: Tensor, land: Landscape, which: Sequence[int]) -> Tensor:
    """Log of the summed weights of the nearest slots, of tokens anywhere; `(groups, heads of a group, tokens)`."""
    groups, _, size = grouped.shape
    columns = slots[:, None] - torch.arange(land.near, device=slots.device)
    shown = _some(keys, which)[:, columns.clamp(min=0)]  # (groups, tokens, near, head_dim)
    rows = grouped.view(groups, -1, len(slots), size).transpose(1, 2)  # (groups, tokens, heads of a group, head_dim)
    scores = (rows @ shown.transpose(-1, -2)).float()
    scores = scores.masked_fill_(~_countable(columns, land)[None, :, None], _NEVER)
    return _log_sum(scores).transpose(1, 2)


def _near_run(grouped: Tensor, slots: Tensor, keys: Tensor, land: Landscape, which: Sequence[int]) -> Tensor:
    """The same for consecutive tokens: blocks of `near` tokens, each against the two blocks of keys that hold their nearest."""
    groups, _, size = grouped.shape
    count, first, near = len(slots), int(slots[0]), land.near
    blocks = math.ceil(count / near)
    low, high = first - near, first + blocks * near
    shown = F.pad(
        _some(keys[:, max(low, 0) : min(high, keys.shape[1])], which),
        (0, 0, max(-low, 0), max(high - keys.shape[1], 0)),
    )
    windows = shown.unfold(1, 2 * near, near)  # (groups, blocks, head_dim, 2 * near)
    rows = F.pad(grouped.view(groups, -1, count, size), (0, 0, 0, blocks * near - count))
    rows = rows.view(groups, -1, blocks, near, size).transpose(
        1, 2
    )  # (groups, blocks, heads of a group, near, head_dim)
    scores = (rows.flatten(2, 3) @ windows).view(groups, blocks, -1, near, 2 * near).float()
    place = torch.arange(near, device=keys.device)[:, None]
    offset = torch.arange(2 * near, device=keys.device)[None]
    band = (offset > place) & (offset <= place + near)
    columns = torch.arange(low, high, device=keys.device)
    known = _countable(columns.clamp(max=len(land.live) - 1), land) & (columns < len(land.live))
    counts = known.unfold(0, 2 * near, near)
    scores.masked_fill_(~(band & counts[:, None])[None, :, None], _NEVER)
    found = _log_sum(scores).transpose(1, 2).reshape(groups, -1, blocks * near)
    return found[:, :, :count]
