"""KVEraser: replace the span's keys and values with steering states made by a LoRA on the same model.

Li et al., "KVEraser: Learning to Steer KV Cache for Efficient Localized Context Erasing" (arXiv 2606.17034). Nothing
outside the span is touched: the suffix keeps its positions and its contaminated states, and the steering states correct
for them when later tokens attend to both. The cost depends on the span, and with a window not even on the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kveraser.cache import Steered, Window, rewrite_behind, rewrite_range
from kveraser.eraser import KVEraser, shipped_eraser
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.delete_and_shift import check_movable


@dataclass(frozen=True)
class Steering(EraseMethod):
    """Re-encode the spans with the eraser active and write the states into their own slots.

    Args:
        eraser: the LoRA eraser; None takes the one of the context or the one that ships for the model.
        window: `(sink, local)` slots that a pass attends to before its tokens; None takes what the eraser was trained
            with. A window of (0, 0) shows it the span alone.
        full_prefix: attend to the whole prefix, whatever the eraser was trained with.
        repair: afterwards recompute the first `repair` live tokens behind each span with the unchanged model, in the
            same window (so its cost is constant, too) and as if the span had never been there; None takes what the
            eraser was trained with.
    """

    eraser: KVEraser | None = None
    window: Window | None = None
    full_prefix: bool = False
    repair: int | None = None

    name: ClassVar[str] = "kveraser"
    summary: ClassVar[str] = "replace the span's states with learned steering states"
    needs_eraser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 0:
            raise OptionError(f"window={self.window} must be two counts (sink, local) of at least 0")
        if self.repair is not None and self.repair < 0:
            raise OptionError(f"repair={self.repair} must be at least 0 tokens")

    def _eraser(self, edit: Edit) -> KVEraser:
        return self.eraser or edit.eraser or shipped_eraser(edit.model)

    def _repair(self, edit: Edit) -> int:
        return self._eraser(edit).repair if self.repair is None else self.repair

    def plan(self, edit: Edit) -> Plan:
        self._eraser(edit).check_model(edit.model)
        if self._repair(edit):
            check_movable(edit)
        return Plan(edit.length, (*edit.spans, *edit.runs_behind(self._repair(edit))))

    def apply(self, edit: Edit) -> Outcome:
        eraser = self._eraser(edit)
        window = None if self.full_prefix else eraser.window if self.window is None else self.window
        steering_model = eraser.attached(edit.model)
        written = recomputed = 0
        for span in edit.spans:
            written += rewrite_range(steering_model, edit.cache, edit.tokens, span, window)
            recomputed += len(span)
        for span, runs in edit.neighbors(self._repair(edit)):
            if runs:
                written += rewrite_behind(edit.model, edit.cache, edit.tokens, span, runs, window)
                recomputed += sum(len(run) for run in runs)
        steered = tuple(Steered.mark(edit.cache, span) for span in edit.spans)
        marks = edit.marks.contaminated(edit.spans[0].start).steer(steered)
        return Outcome(marks, steered=edit.spans, tokens_recomputed=recomputed, bytes_written=written)
