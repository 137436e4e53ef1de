"""Selective recomputation: delete-and-shift, then recompute the suffix tokens that deviate most.

The idea of CacheBlend (Yao et al., EuroSys 2025, arXiv 2405.16444) carried over to erasing. Layer 0's keys and values
depend on the token alone, so layer 1 is the first where a cached token can deviate from what a fresh prefill would give
it. The tokens with the largest deviation there are run again through all layers, each attending to the whole cache, in
which its fellow selected tokens are already new. Finding them costs one layer over the whole suffix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kveraser.cache import Can, Repair, Tokens
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, Outcome, Plan
from kveraser.methods.moving import MovingRepair, mended_from
from kveraser.spans import Span, gaps


@dataclass(frozen=True)
class SelectiveRecompute(MovingRepair):
    """Drop the spans, close the gaps and recompute the suffix tokens that deviate most in layer 1.

    The last token is always among them. With `ratio=1` it equals `full-recompute` and is exact.

    Args:
        ratio: which share of the live suffix.
        tokens: how many, per span, instead.
    """

    ratio: float = 0.15
    tokens: int | None = None

    name: ClassVar[str] = "selective-recompute"
    summary: ClassVar[str] = "delete-and-shift, then recompute the 15 % that deviate most"
    needs: ClassVar[frozenset[Can]] = frozenset(Can) - {Can.STEER, Can.OPEN}
    timed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise OptionError(f"ratio={self.ratio} must be above 0 and at most 1")
        self.check_tokens(self.tokens)

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        start = edit.spans[0].start
        tokens, written = self.moved(edit)
        suffix = Span(start, tokens.length)
        left, fresh = edit.marks.cut(edit.spare), self.fresh(edit)
        done = sorted((*fresh, *(span for span in left.steered_spans if span.start >= start)))
        live = torch.cat([torch.arange(run.start, run.end) for run in gaps(done, suffix.end, start)])
        wanted = math.ceil(self.ratio * len(live)) if self.tokens is None else self.tokens * len(edit.spans)
        count = min(wanted, len(live))
        marks = left.contaminated(plan.layout_from)
        if count + sum(map(len, fresh)) == len(suffix):
            written += edit.backend.recompute(tokens, suffix)
            marks = mended_from(marks, start)
        else:
            chosen = self._choose(edit, tokens, suffix, live, count).to(tokens.ids.device)
            seen = [torch.arange(run.start, run.end) for run in gaps(left.steered_spans, suffix.end)]
            repair = Repair(chosen, torch.cat(seen).to(chosen), left.steered_spans)
            for part in repair.parts(edit.backend.chunk):
                written += edit.backend.rewrite(tokens, (), [part])
        return Outcome(marks, removed=edit.spare, tokens_recomputed=count + sum(edit.new), bytes_written=written)

    @staticmethod
    def _choose(edit: Edit, tokens: Tokens, suffix: Span, live: Tensor, count: int) -> Tensor:
        """The slots to recompute, sorted, `(count,)`: the mean over the batch of ||new - cached||, keys plus values."""
        layers = edit.backend.cache.layers
        layer = min(1, len(layers) - 1)
        fresh = edit.backend.look(tokens, suffix, layer)
        held = (layers[layer].keys, layers[layer].values)
        deviation = sum(
            (new.float() - old[:, :, suffix.slice].float()).pow(2).sum((1, 3)).mean(0)
            for new, old in zip(fresh, held, strict=True)
        )
        assert isinstance(deviation, Tensor)
        scores = deviation.cpu()[live - suffix.start]
        scores[-1] = torch.inf
        return live[scores.topk(count).indices].sort().values
