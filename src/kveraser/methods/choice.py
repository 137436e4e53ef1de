"""Tokens that a method has chosen to recompute.

Knows: slots, which of them a token sees. Does not know how they were chosen (`choosing.py`), or what is erased.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kveraser.cache import Repair
from kveraser.methods.slots import runs_of
from kveraser.spans import Span


@dataclass(frozen=True)
class Choice:
    """Tokens that were chosen to be recomputed, in slots before the edit.

    Attributes:
        slots: `(n,)` int64, in order.
        sees: `(m,)` int64, the slots that they see besides each other, in order.
        samples: `(k,)` int64, others of which each stands for `stand_for` slots that they do not see.
        residual: share of the attention to the spans that is left unrepaired; None where nothing was scored.
        notes: what the user should know of how they were chosen.
    """

    slots: Tensor = field(repr=False)
    sees: Tensor = field(repr=False)
    residual: float | None = None
    notes: tuple[str, ...] = ()
    samples: Tensor | None = field(default=None, repr=False)
    stand_for: float = 1.0

    def repair(self, absent: tuple[Span, ...], place: Tensor | None = None) -> Repair:
        """The pass over them, in which they see each other in their new states.

        Args:
            absent: as of `Repair`.
            place: `(slots before the edit,)`, where each slot is now; None: where it was.
        """
        shown = [self.slots, self.sees] if self.samples is None else [self.slots, self.sees, self.samples]
        sees = torch.cat(shown).unique()
        weights = None if self.samples is None else torch.where(torch.isin(sees, self.samples), self.stand_for, 1.0)
        slots = self.slots if place is None else place[self.slots]
        return Repair(slots, sees if place is None else place[sees], absent, weights)

    @property
    def runs(self) -> tuple[Span, ...]:
        """The chosen slots as runs."""
        return runs_of(self.slots)
