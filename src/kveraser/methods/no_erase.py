"""No erase: the context as it is, with the span still in it. The upper bound of what can leak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan


@dataclass(frozen=True)
class NoErase(EraseMethod):
    """Leave the cache alone. The baseline every other method is measured against."""

    name: ClassVar[str] = "no-erase"
    summary: ClassVar[str] = "leave the span in the context (baseline)"
    timed: ClassVar[bool] = False
    removes: ClassVar[bool] = False

    def plan(self, edit: Edit) -> Plan:
        return Plan(edit.length)

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        return Outcome(edit.marks)
