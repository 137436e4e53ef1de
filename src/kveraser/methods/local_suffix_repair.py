"""Local suffix repair: delete-and-shift, then recompute the first tokens behind the span exactly.

Most of what a span leaves behind is in the tokens right after it. A baseline of the paper (arXiv 2606.17034), and the
strongest simple competitor: its cost does not grow with the suffix, apart from moving it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kveraser.cache import Can
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.delete_and_shift import moving_plan
from kveraser.spans import merge_spans, remap


@dataclass(frozen=True)
class LocalSuffixRepair(EraseMethod):
    """Drop the spans, close the gaps and recompute the first `tokens` live tokens behind each span.

    With `tokens` at least the length of the suffix it equals `full-recompute` and is exact.
    """

    tokens: int = 32

    name: ClassVar[str] = "local-suffix-repair"
    summary: ClassVar[str] = "delete-and-shift, then recompute the next 32 tokens"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.DELETE, Can.RECOMPUTE})
    moves_keys: ClassVar[bool] = True
    budget_option: ClassVar[str | None] = "tokens"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError(f"tokens={self.tokens} must be at least 1; use delete-and-shift to recompute nothing")

    def plan(self, edit: Edit) -> Plan:
        return moving_plan(edit)

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        repaired = merge_spans((remap(run, edit.spans) for run in edit.runs_behind(self.tokens)), edit.length)
        tokens, written = edit.backend.delete(edit.tokens, edit.spans)
        for run in repaired:
            written += edit.backend.recompute(tokens, run)
        marks = edit.marks.cut(edit.spans).contaminated(plan.layout_from)
        if repaired[0].start == marks.approximate_from and repaired[0].end == tokens.length:
            marks = replace(marks, approximate_from=None)
        return Outcome(
            marks,
            removed=edit.spans,
            recomputed=edit.runs_behind(self.tokens),
            tokens_recomputed=sum(len(run) for run in repaired),
            bytes_written=written,
        )
