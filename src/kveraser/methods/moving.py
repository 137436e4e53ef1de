"""What the methods share that drop the spans and let what follows them move up.

Knows: edits, plans, marks. Does not know which tokens such a method recomputes afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from kveraser.cache import Marks, Tokens
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Plan
from kveraser.spans import Span, remap


class Moving(EraseMethod):
    """A method whose plan is to move everything behind the first span."""

    moves_keys: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    def plan(self, edit: Edit) -> Plan:
        """The slots from the first span on, or as many more as the backend has to change.

        Raises:
            UnsupportedCacheError, OptionError: keys that cannot be moved.
        """
        edit.backend.check_movable()
        return Plan(edit.backend.moves_from(edit.spans[0].start))

    @staticmethod
    def close(edit: Edit) -> tuple[Tokens, int]:
        """Drop the slots that no new token takes; the tokens that are left, and the bytes that were moved."""
        return edit.backend.delete(edit.tokens, edit.spare) if edit.spare else (edit.tokens, 0)

    def moved(self, edit: Edit) -> tuple[Tokens, int]:
        """`close`, and new tokens computed behind what is before them; as of `close`."""
        tokens, written = self.close(edit)
        return tokens, written + sum(edit.backend.recompute(tokens, run) for run in self.fresh(edit))

    @staticmethod
    def fresh(edit: Edit) -> tuple[Span, ...]:
        """The slots of the new tokens once the gaps are closed."""
        return tuple(remap(run, edit.spare) for run in edit.fresh)


class MovingRepair(Moving):
    """A method that then recomputes some `tokens` behind each span."""

    budget_option: ClassVar[str | None] = "tokens"

    @staticmethod
    def check_tokens(tokens: int | None) -> None:
        """Raise `OptionError` where nothing would be recomputed."""
        if tokens is not None and tokens < 1:
            raise OptionError(f"tokens={tokens} must be at least 1; use delete-and-shift to recompute nothing")


def mended_from(marks: Marks, start: int) -> Marks:
    """The marks when everything from a slot on was recomputed exactly."""
    return replace(marks, approximate_from=None) if marks.approximate_from == start else marks
