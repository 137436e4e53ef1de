"""What tables, curves and latency plots want to know of a method, as attributes of its class.

Knows: a method is a dataclass, and one of its options may say how much is recomputed. Does not know what methods do, or the tables.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self, cast


class Compared:
    """How a method stands beside the others. The attributes are right for most."""

    budget_option: ClassVar[str | None] = None
    """The option that says how many tokens behind each span are recomputed, if there is one."""
    compared: ClassVar[bool] = True
    """Whether tables compare it with the others; not where it only chooses among them."""
    compared_at_nothing: ClassVar[bool] = False
    """Whether tables also show it with nothing recomputed, since it erases even then."""
    timed: ClassVar[bool] = True
    """Whether short tables of latency show it."""

    def with_budget(self, tokens: int) -> Self:
        """The method at so many recomputed tokens per span; methods without such an option stay as they are."""
        changed: dict[str, int] = {} if self.budget_option is None else {self.budget_option: tokens}
        return cast("Self", replace(cast("Any", self), **changed))

    @property
    def recomputes(self) -> int | None:
        """How many tokens behind each span it is told to recompute; None where that is not said."""
        return None if self.budget_option is None else getattr(self, self.budget_option)
