"""Which slots lie where, before and after an edit: runs behind spans, runs of chosen slots, the end of the context, stand-ins.

Knows: spans. Does not know about states, methods or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kveraser.cache import slots_of
from kveraser.spans import Span, merge_spans


def neighbors(
    spans: tuple[Span, ...], steered: tuple[Span, ...], length: int, counts: Sequence[int]
) -> list[tuple[Span, tuple[Span, ...]]]:
    """For each of the (sorted) spans, the first live slots behind it, as disjoint runs.

    Args:
        counts: how many of each.
        steered: slots with steering states of earlier edits; they are no live ones.
        length: number of slots.
    """
    found: list[tuple[Span, list[Span]]] = []
    at, budget = spans[0].start, 0
    blocks = sorted((*spans, *(span for span in steered if span.start > at)))
    for block in (*blocks, Span(length, length + 1)):
        taken = min(block.start - at, budget)
        if taken > 0:
            found[-1][1].append(Span(at, at + taken))
            budget -= taken
        if block in spans:
            found.append((block, []))
            budget = counts[spans.index(block)]
        at = block.end
    return [(span, tuple(runs)) for span, runs in found]


def runs_of(slots: Tensor) -> tuple[Span, ...]:
    """Sorted slots as the fewest spans."""
    if not len(slots):
        return ()
    breaks = (slots[1:] != slots[:-1] + 1).nonzero()[:, 0].tolist()
    listed = slots.tolist()
    edges = [0, *(index + 1 for index in breaks), len(listed)]
    return tuple(Span(listed[a], listed[b - 1] + 1) for a, b in pairwise(edges))


def with_slots(slots: Tensor, runs: Iterable[Span]) -> Tensor:
    """Some slots and those of runs, in order, each once."""
    more = slots_of(runs, slots.device)
    return torch.cat([slots, more]).unique() if len(more) else slots


def split_tail(spans: tuple[Span, ...], steered: Iterable[Span], length: int) -> tuple[tuple[Span, ...], int]:
    """Take the (sorted) spans that end the context off the others; returns these and where the context is to be cropped.

    Steered slots that are last, or would then be, are cropped with them: a context ends with a live token.
    """
    end = length
    rest = list(spans)
    steered = sorted(steered)
    while end > 0:
        if rest and rest[-1].end == end:
            end = rest.pop().start
        elif steered and steered[-1].end >= end:
            last = steered.pop()
            end = min(end, last.start) if last.end == end else end
        else:
            break
    return tuple(rest), end


def find_stand_ins(
    erased: tuple[Span, ...], removed: tuple[Span, ...], steered: tuple[Span, ...], length: int
) -> tuple[tuple[Span, int], ...]:
    """For steered slots next to what was erased, the nearest slot that stays: before the run of gone tokens, else behind.

    Older steered slots are among them when the token that stood in for them has gone now, or is another one.
    """
    found = []
    for run in merge_spans((*removed, *steered), length) if removed or steered else ():
        if any(span.start <= run.end and run.start <= span.end for span in erased):
            source = run.start - 1 if run.start else run.end
            found += [(span, source) for span in steered if span.overlaps(run) and source < length]
    return tuple(found)
