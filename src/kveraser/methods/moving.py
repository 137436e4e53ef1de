"""What the methods share that drop the spans and let what follows them move up.

Knows: edits, plans, marks. Does not know which tokens such a method recomputes afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from kveraser.cache import Marks
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Plan


class Moving(EraseMethod):
    """A method whose plan is to move everything behind the first span."""

    moves_keys: ClassVar[bool] = True

    def plan(self, edit: Edit) -> Plan:
        """The slots from the first span on, or as many more as the backend has to change.

        Raises:
            UnsupportedCacheError, OptionError: keys that cannot be moved.
        """
        edit.backend.check_movable()
        return Plan(edit.backend.moves_from(edit.spans[0].start))


class MovingRepair(Moving):
    """A method that then recomputes some `tokens` behind each span."""

    budget_option: ClassVar[str | None] = "tokens"

    @staticmethod
    def check_tokens(tokens: int) -> None:
        """Raise `OptionError` where nothing would be recomputed."""
        if tokens < 1:
            raise OptionError(f"tokens={tokens} must be at least 1; use delete-and-shift to recompute nothing")


def mended_from(marks: Marks, start: int) -> Marks:
    """The marks when everything from a slot on was recomputed exactly."""
    return replace(marks, approximate_from=None) if marks.approximate_from == start else marks
