"""Delete-and-shift: drop the span's slots and move the suffix up, turning its keys back to their new positions.

No token is run through the model, but for its first keys. The suffix still carries what it saw of the span in its own states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kveraser.cache import Can
from kveraser.methods.base import Edit, Outcome, Plan
from kveraser.methods.moving import Moving


@dataclass(frozen=True)
class DeleteAndShift(Moving):
    """Remove the span's keys and values and close the gap. The approximate baseline of the paper (arXiv 2606.17034)."""

    name: ClassVar[str] = "delete-and-shift"
    summary: ClassVar[str] = "drop the span's states, re-rotate the suffix keys"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.DELETE})

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        _, written = self.moved(edit)
        marks = edit.marks.cut(edit.spare).contaminated(plan.layout_from)
        return Outcome(marks, removed=edit.spare, tokens_recomputed=sum(edit.new), bytes_written=written)
