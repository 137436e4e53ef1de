"""Auto: exact recomputation where it is as cheap as steering, else steering.

Right behind a span, or after a short suffix, recomputing costs no more than steering, and is exact. A cost model that is
measured once per machine tells which is which; the receipt names the method that was used.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from kveraser.cache import Can
from kveraser.eraser import KVEraser
from kveraser.methods.base import Edit, EraseMethod
from kveraser.methods.choosing import CLOSER, calibration_of, most_shown
from kveraser.methods.cost_model import CostModel, cost_model
from kveraser.methods.full_recompute import FullRecompute
from kveraser.methods.slots import split_tail
from kveraser.methods.steering import Steering


@dataclass(frozen=True)
class Auto(EraseMethod):
    """Choose between `full-recompute` and `kveraser` by predicted time.

    Args:
        eraser: as for `Steering`.
        patience: how much slower exact recomputation may be and still be preferred.
        costs: the cost model; None takes the one measured on this machine.
    """

    eraser: KVEraser | None = None
    patience: float = 1.0
    costs: CostModel | None = field(default=None, repr=False)

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "full-recompute where it is as cheap as kveraser, else kveraser"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.STEER, Can.READ})
    timed: ClassVar[bool] = False
    needs_eraser: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    compared: ClassVar[bool] = False

    def chosen(self, edit: Edit) -> EraseMethod:
        steering = Steering(self.eraser)
        rest, _ = split_tail(edit.spans, edit.marks.steered_spans, edit.length)
        if not rest:  # only to be cropped, which is free; mending what earlier edits left is not
            return FullRecompute() if edit.marks.exact else steering
        eraser, model = steering.using(edit), edit.backend.model
        inner = replace(edit, spans=rest, new=edit.new[: len(rest)])
        calibration = calibration_of(inner, eraser.calibration)
        attached = model if eraser.is_neutral else cast("KVEraser", eraser).attached(model)
        costs = self.costs or cost_model(model, attached, calibration)
        start = min(edit.spans[0].start, edit.length if edit.marks.exact else edit.marks.approximate_from or 0)
        removed = sum(len(span) for span in (*edit.spans, *edit.marks.steered_spans))
        exact = costs.recompute(start, max(edit.length - removed + sum(edit.new), start))
        quick = sum(
            costs.steer(turn.tokens_steered, turn.tokens - turn.tokens_steered, turn.columns)
            for turn in steering.passes(inner)
        )
        if steering.chooses(inner) == "readers":
            quick += self._reading(inner, steering, costs)
        return FullRecompute() if exact <= quick * self.patience else steering

    @staticmethod
    def _reading(edit: Edit, steering: Steering, costs: CostModel) -> float:
        """Predicted seconds of telling and recomputing the readers of the edit's spans."""
        suffix = int((edit.kept > edit.spans[0].start).sum())
        count = min(steering.budget(edit), suffix)
        if not count:
            return 0.0
        columns = most_shown(count, len(edit.kept), steering.keys)
        telling = costs.tell(suffix, CLOSER * count) if count < suffix else 0.0
        more = (count - 1) // costs.chunk * costs.steering.base  # passes beyond the first
        return telling + more + costs.steer(0, count, columns) - (costs.steering.base if steering.passes(edit) else 0.0)
