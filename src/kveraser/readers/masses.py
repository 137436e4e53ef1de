"""How much of its attention a token gave to the slots of a span.

Knows: queries, keys, softmax. Does not know where the queries come from or what is done with the masses.

A softmax over the whole context would cost a pass of the model. Over the first slots (the attention sink), the nearest 64
and the span itself it ranks tokens as well; what is left out of the denominator is estimated from some hundred sampled
slots, so that the masses of distant tokens are not overstated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

SINK = 4
NEAR = 64
SAMPLES, FEW_SAMPLES = 256, 64
_NEVER = -torch.inf


@dataclass(frozen=True)
class Landscape:
    """What the tokens of one row may have attended to.

    Attributes:
        live: `(slots,)` bool: no padding, nothing erased earlier. The span's own slots are live.
        span: `(n,)` slots of the span (or spans).
        sink: `(SINK,)` or fewer, the first live slots outside of the span.
        samples: `(m,)` slots drawn evenly from what is neither.
        between: `(slots + 1,)`, how many live slots outside of span and sink there are before each slot.
    """

    live: Tensor
    span: Tensor
    sink: Tensor
    samples: Tensor
    between: Tensor

    def thinned(self) -> Landscape:
        """With fewer samples, for a look at many tokens."""
        return replace(self, samples=self.samples[:: SAMPLES // FEW_SAMPLES])

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
    queries: Tensor, slots: Tensor, keys: Tensor, scaling: float, land: Landscape, *, run: bool
) -> tuple[Tensor, Tensor]:
    """The share of their attention that tokens gave to the span, per head.

    Args:
        queries: `(heads, tokens, head_dim)`, rotated, in the type to compute in.
        slots: `(tokens,)`, where the tokens are.
        keys: `(kv_heads, slots, head_dim)` of the layer.
        run: whether the slots are consecutive, which is faster.

    Returns:
        Masses `(heads, tokens)`, and the logarithm of the denominators, `(heads, tokens)`; both float32.
    """
    heads, count, size = queries.shape
    groups = keys.shape[0]
    grouped = (queries * scaling).to(keys.dtype).reshape(groups, heads // groups * count, size)

    def against(columns: Tensor, visible: Tensor) -> Tensor:
        """Log of the summed weights of some columns; `visible` `(tokens, columns)`."""
        if not len(columns):
            return torch.full((heads, count), _NEVER, device=queries.device)
        scores = (grouped @ keys[:, columns].transpose(-1, -2)).view(heads, count, -1).float()
        if not bool(visible.all()):
            scores.masked_fill_(~visible, _NEVER)
        return scores.logsumexp(-1)

    before = slots[:, None]
    span = against(land.span, land.span < before)
    sink = against(land.sink, land.sink <= before)
    seen = land.samples <= before - NEAR
    drawn = seen.sum(-1)
    far = against(land.samples, seen)
    stand_for = land.between[(slots - NEAR + 1).clamp(min=0)].float() / drawn.clamp(min=1)
    far = far + stand_for.clamp(min=1).log()
    near = (_near_run if run else _near)(grouped, slots, keys, land, heads)
    whole = torch.stack([span, sink, far, near]).logsumexp(0)
    return (span - whole).exp(), whole


def _countable(columns: Tensor, land: Landscape) -> Tensor:
    """Which of the slots count as near ones: live, and in no other part of the denominator."""
    marked = land.live.clone()
    marked[land.span] = False
    marked[land.sink] = False
    return marked[columns.clamp(min=0)] & (columns >= 0)


def _near(grouped: Tensor, slots: Tensor, keys: Tensor, land: Landscape, heads: int) -> Tensor:
    """Log of the summed weights of the nearest slots, of tokens anywhere."""
    groups, _, size = grouped.shape
    columns = slots[:, None] - torch.arange(NEAR, device=slots.device)
    shown = keys[:, columns.clamp(min=0)]  # (groups, tokens, NEAR, head_dim)
    rows = grouped.view(groups, -1, len(slots), size).transpose(1, 2)  # (groups, tokens, heads of a group, head_dim)
    scores = (rows @ shown.transpose(-1, -2)).float()
    scores = scores.masked_fill_(~_countable(columns, land)[None, :, None], _NEVER)
    return scores.logsumexp(-1).transpose(1, 2).reshape(heads, len(slots))


def _near_run(grouped: Tensor, slots: Tensor, keys: Tensor, land: Landscape, heads: int) -> Tensor:
    """The same for consecutive tokens: blocks of NEAR tokens, each against the two blocks of keys that hold their nearest."""
    groups, _, size = grouped.shape
    count, first = len(slots), int(slots[0])
    blocks = math.ceil(count / NEAR)
    low, high = first - NEAR, first + blocks * NEAR
    shown = F.pad(keys[:, max(low, 0) : min(high, keys.shape[1])], (0, 0, max(-low, 0), max(high - keys.shape[1], 0)))
    windows = shown.unfold(1, 2 * NEAR, NEAR)  # (groups, blocks, head_dim, 2 * NEAR)
    rows = F.pad(grouped.view(groups, -1, count, size), (0, 0, 0, blocks * NEAR - count))
    rows = rows.view(groups, -1, blocks, NEAR, size).transpose(
        1, 2
    )  # (groups, blocks, heads of a group, NEAR, head_dim)
    scores = (rows.flatten(2, 3) @ windows).view(groups, blocks, -1, NEAR, 2 * NEAR).float()
    place = torch.arange(NEAR, device=keys.device)[:, None]
    offset = torch.arange(2 * NEAR, device=keys.device)[None]
    band = (offset > place) & (offset <= place + NEAR)
    columns = torch.arange(low, high, device=keys.device)
    counts = (_countable(columns.clamp(max=len(land.live) - 1), land) & (columns < len(land.live))).unfold(
        0, 2 * NEAR, NEAR
    )
    scores = scores.masked_fill_(~(band & counts[:, None])[None, :, None], _NEVER)
    found = scores.logsumexp(-1).transpose(1, 2).reshape(groups, -1, blocks * NEAR)
    return found[:, :, :count].reshape(heads, count)
