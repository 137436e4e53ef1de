"""Which tokens to recompute, given how much each of them has read.

Knows: scores and slots. Does not know where the scores come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kveraser.spans import Span

FIRST = 8
"""Live tokens behind each span that are always recomputed: some heads look at the token right before, across the gap."""


NEWEST, NEWEST_WEIGHT = 32, 4.0
"""What the last live tokens have read counts so many times: whatever comes next looks at them most."""

CARRIED = 0.5
"""How much of what the token right before it has read was carried on to a token."""
ONE_IN = 10
"""Of so many recomputed tokens one is chosen by what was carried on to it."""

RULE = f"the first {FIRST}, the newest {NEWEST} times {NEWEST_WEIGHT:g}, one in {ONE_IN} by what is carried on, {CARRIED:g}"
"""How single tokens are chosen; what was chosen by another rule must not be taken for it."""


def weights_of(slots: Tensor) -> Tensor:
    """How much it matters what each of the live slots has read, `(suffix,)`."""
    weights = torch.ones(len(slots), device=slots.device)
    weights[max(len(slots) - NEWEST, 0) :] = NEWEST_WEIGHT
    return weights


def carried_on(scores: Tensor) -> Tensor:
    """What each token has read, half of what the one before it has, a quarter of what the one before that has, and so on.

    Some heads look at the token right before. So what has been read goes on to the next token, which may hardly have looked at the
    span: left out between two that are recomputed, it still says what it said (`docs/log.md`: one token that was left out).

    Args:
        scores: `(suffix,)`, of the live slots in order.
    """
    found = scores
    for step in (1, 2, 4):  # together: up to seven tokens on
        found = found + CARRIED**step * F.pad(found, (step, 0))[: len(scores)]
    return found


def first_behind(spans: Sequence[Span], slots: Tensor, budget: int) -> Tensor:
    """The first live slots behind each span, up to the next one, at most `budget` in all; `(n,)`, in order.

    Args:
        slots: `(suffix,)`, the live slots.
    """
    found = []
    ends = [*(span.start for span in spans[1:]), int(slots[-1]) + 1 if len(slots) else 0]
    share = min(FIRST, budget // len(spans)) or min(budget, 1)
    for span, end in zip(spans, ends, strict=True):
        near = slots[(slots >= span.end) & (slots < end)]
        found.append(near[:share])
    return torch.cat(found)[:budget]


def choose(
    slots: Tensor,
    scores: Tensor,
    always: Tensor,
    budget: int,
    *,
    weights: Tensor | None = None,
    coverage: float | None = None,
    block: int | None = None,
) -> Tensor:
    """The slots to recompute, in order: nine of ten by what they have read, then the others by what was carried on to them.

    What is carried on adds tokens and pushes no reader out: see `carried_on`.

    Args:
        slots: `(suffix,)`, the live slots behind the first span.
        scores: `(suffix,)`, how much each has read.
        always: some of the slots that are among them in any case.
        budget: how many at most.
        weights: `(suffix,)`, how much it matters what each has read; None: the same for all.
        coverage: take no more readers when so much of all scores is covered.
        block: choose whole runs on multiples of so many slots, by their summed scores; weights do not count then (a run is
            too much to give away for a few tokens at the end), nor what is carried on (most of it is in the run anyway).
    """
    if block is not None:
        return _blocks(slots, scores, always, budget, coverage, block)
    weight = torch.ones_like(scores) if weights is None else weights
    most = max(budget - budget // ONE_IN, min(len(always), budget))
    readers = _best(scores * weight, torch.isin(slots, always), most)
    if coverage is not None:
        readers = readers[: max(_enough(scores[readers], scores.sum(), coverage), min(len(always), len(readers)))]
    chosen = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
    chosen[readers] = True
    count = min(len(readers) + len(readers) // (ONE_IN - 1), budget)
    return slots[_best(carried_on(scores) * weight, chosen, count).sort().values]


def _best(scores: Tensor, first: Tensor, count: int) -> Tensor:
    """The places of the highest scores, those marked as `first` before all others."""
    return scores.masked_fill(first, torch.inf).argsort(descending=True, stable=True)[:count]


def _blocks(slots: Tensor, scores: Tensor, always: Tensor, budget: int, coverage: float | None, block: int) -> Tensor:
    place = slots // block
    sums = torch.zeros(int(place.max()) + 1, device=slots.device).index_add_(0, place, scores)
    wanted = sums.clone()
    wanted[(always // block).unique()] = torch.inf
    there = place.unique()
    order = there[wanted[there].argsort(descending=True, stable=True)]
    tokens = torch.bincount(place)[order].cumsum(0)  # those at the borders of what is live are shorter
    order = order[: max(int((tokens <= budget).sum()), 1)]
    if coverage is not None:
        least = min(len((always // block).unique()), len(order))
        order = order[: max(_enough(sums[order], scores.sum(), coverage), least)]
    return slots[torch.isin(place, order)]


def _enough(scores: Tensor, total: Tensor, coverage: float) -> int:
    """How many of the scores, from the first on, make up the share `coverage` of the total."""
    short = scores.cumsum(0) < coverage * total * (1 - 1e-6)
    return min(int(short.sum()) + 1, len(scores))


def residual(slots: Tensor, scores: Tensor, chosen: Tensor) -> float:
    """The share of all scores that is not covered by the chosen slots."""
    total = float(scores.sum())
    left = float(scores[~torch.isin(slots, chosen)].sum())
    return left / total if total > 0 else 0.0
