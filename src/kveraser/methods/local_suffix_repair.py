"""Local suffix repair: delete-and-shift, then recompute the first tokens behind the span exactly.

Most of what a span leaves behind is in the tokens right after it. A baseline of the paper (arXiv 2606.17034), and the
strongest simple competitor: its cost does not grow with the suffix, apart from moving it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kveraser.cache import Can
from kveraser.methods.base import Edit, Outcome, Plan
from kveraser.methods.moving import MovingRepair
from kveraser.spans import merge_spans, remap


@dataclass(frozen=True)
class LocalSuffixRepair(MovingRepair):
    """Drop the spans, close the gaps and recompute the first `tokens` live tokens behind each span.

    With `tokens` at least the length of the suffix it equals `full-recompute` and is exact.
    """

    tokens: int = 32

    name: ClassVar[str] = "local-suffix-repair"
    summary: ClassVar[str] = "delete-and-shift, then recompute the next 32 tokens"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.DELETE, Can.RECOMPUTE})

    def __post_init__(self) -> None:
        self.check_tokens(self.tokens)

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        runs = edit.runs_behind([self.tokens] * len(edit.spans))
        behind = (remap(run, edit.spare) for run in runs)
        repaired = merge_spans((*self.fresh(edit), *behind), edit.length)
        tokens, written = self.close(edit)
        for run in repaired:
            written += edit.backend.recompute(tokens, run)
        marks = edit.marks.cut(edit.spare).contaminated(plan.layout_from)
        if repaired[0].start == marks.approximate_from and repaired[0].end == tokens.length:
            marks = replace(marks, approximate_from=None)
        return Outcome(
            marks,
            removed=edit.spare,
            recomputed=runs,
            tokens_recomputed=sum(len(run) for run in repaired),
            bytes_written=written,
        )
