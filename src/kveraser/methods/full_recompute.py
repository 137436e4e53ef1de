"""Full recomputation: keep the prefix, drop the span, run the whole suffix again. Exact, and the teacher of all others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.spans import merge_spans


@dataclass(frozen=True)
class FullRecompute(EraseMethod):
    """Recompute everything behind the first place that is not exact, in chunks as a long prefill does.

    Afterwards the cache equals a fresh prefill of the tokens that remain, whatever earlier edits had left.

    Args:
        chunk: tokens per forward; None for as many as pay where the model is.
    """

    chunk: int | None = None

    name: ClassVar[str] = "full-recompute"
    summary: ClassVar[str] = "recompute the whole suffix (exact)"
    exact: ClassVar[bool] = True
    mends: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    rebuilds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise OptionError(f"chunk={self.chunk} must be at least 1 token")

    def _start(self, edit: Edit) -> int:
        starts = [span.start for span in edit.spans]
        if edit.marks.approximate_from is not None:
            starts.append(edit.marks.approximate_from)
        return min(starts)

    def plan(self, edit: Edit) -> Plan:
        return Plan(self._start(edit))

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        start = self._start(edit)
        gone = edit.absent
        removed = merge_spans(gone, edit.length) if gone else ()  # nothing: only to mend, or all slots are taken again
        tokens, chunk = edit.tokens.without(removed), self.chunk or edit.backend.chunk
        if edit.blank:
            edit.backend.crop(start)
            edit.backend.extend(tokens, chunk)
            written = edit.backend.bytes_per_slot * (tokens.length - start)
        else:
            written = edit.backend.rebuild(tokens, removed, start, chunk)
        return Outcome(
            marks=replace(edit.marks, approximate_from=None, steered=()),
            removed=removed,
            tokens_recomputed=tokens.length - start,
            bytes_written=written,
        )
