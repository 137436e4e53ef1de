"""Attention-guided repair: delete-and-shift, then recompute the tokens that have read the span.

The strongest method without steering states, and the measure of what staying in place is worth. Which tokens have read the
span is told from the cache (`readers`). Cache-Craft (arXiv 2502.15734) uses stored attention to earlier chunks alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kveraser.cache import Can
from kveraser.methods.base import Edit, Outcome, Plan
from kveraser.methods.choosing import Wish, choose_readers
from kveraser.methods.moving import MovingRepair, mended_from
from kveraser.spans import Span


@dataclass(frozen=True)
class AttentionGuidedRepair(MovingRepair):
    """Drop the spans, close the gaps and recompute those live tokens that have read the spans most.

    With `keys=None` and at least the whole suffix it equals `full-recompute` and is exact.

    Args:
        tokens: how many, per span; None: as many as a span of its length deserves (`readers.how_many`). Chosen as `Steering` does.
        coverage, block, keys: as for `Steering`.
    """

    tokens: int | None = None
    coverage: float | None = None
    block: int | None = None
    keys: int | None = 512

    name: ClassVar[str] = "attention-guided-repair"
    summary: ClassVar[str] = "delete-and-shift, then recompute the tokens that have read the span most"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.DELETE, Can.RECOMPUTE, Can.TELL, Can.RUNS})
    timed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_tokens(self.tokens)
        self._wish()

    def _wish(self) -> Wish:
        return Wish(self.tokens, self.coverage, self.block, self.keys)

    def plan(self, edit: Edit) -> Plan:
        return replace(super().plan(edit), choice=choose_readers(edit, self._wish(), edit.find_eraser().calibration))

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        choice, start = plan.choice, plan.layout_from
        tokens, written = self.moved(edit)
        left = edit.marks.cut(edit.spare)
        marks = left.contaminated(start)
        if choice is None:  # nothing but padding is behind the spans
            return Outcome(
                marks, removed=edit.spare, tokens_recomputed=sum(edit.new), bytes_written=written, residual=0.0
            )
        suffix = Span(edit.spans[0].start, tokens.length)
        if len(choice.slots) + sum(edit.new) == len(suffix) and len(choice.sees) == len(
            edit.after
        ):  # nothing is left out
            written += edit.backend.recompute(tokens, suffix)
            marks = mended_from(marks, start)
        else:
            keep = torch.ones(edit.length, dtype=torch.long, device=tokens.ids.device)
            for span in edit.spare:
                keep[span.slice] = 0
            place = keep.cumsum(0) - 1
            for part in choice.repair(left.steered_spans, place).parts(edit.backend.chunk):
                written += edit.backend.rewrite(tokens, (), [part])
        return Outcome(
            marks,
            removed=edit.spare,
            recomputed=choice.runs,
            tokens_recomputed=len(choice.slots) + sum(edit.new),
            bytes_written=written,
            residual=choice.residual,
            notes=choice.notes,
        )
