"""KVEraser: replace the span's keys and values with steering states made by a LoRA on the same model.

Li et al., "KVEraser: Learning to Steer KV Cache for Efficient Localized Context Erasing" (arXiv 2606.17034). Nothing
outside the span is touched: the suffix keeps its positions and its contaminated states, and the steering states correct
for them when later tokens attend to both. The cost depends on the span, and with a window not even on the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kveraser.cache import PREFILL_CHUNK, Rewrite, Steered, Window, rewrite_runs, window_spans
from kveraser.eraser import KVEraser, shipped_eraser
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.delete_and_shift import check_movable
from kveraser.spans import Span, union_spans

_WORTH_JOINING = 2.0
"""How much more attention than apart spans may cost in one pass: a pass has a price of its own (`docs/performance.md`)."""


@dataclass(frozen=True)
class SteeringPass:
    """One forward: tokens that the eraser re-encodes, and behind them tokens that the plain model recomputes.

    Attributes:
        steered, repaired: these tokens.
        scores_apart: attention scores per head of the passes that were joined into this one; None if none were.
    """

    steered: tuple[Rewrite, ...]
    repaired: tuple[Rewrite, ...] = ()
    scores_apart: int | None = None

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """All of it, in the order of the pass."""
        return (*self.steered, *self.repaired)

    @property
    def tokens(self) -> int:
        """Tokens that run through the model."""
        return sum(map(len, self.rewrites))

    @property
    def tokens_steered(self) -> int:
        """Those of them under the eraser."""
        return sum(map(len, self.steered))

    @property
    def columns(self) -> int:
        """Keys in the attention of every token."""
        shown = (run for rewrite in self.rewrites for run in (*rewrite.sees, *rewrite.slots))
        return sum(map(len, union_spans(shown)))

    @property
    def scores(self) -> int:
        """Attention scores per head."""
        return self.tokens * self.columns

    def joined(self, other: SteeringPass) -> SteeringPass:
        """Both in one."""
        apart = sum(one.scores if one.scores_apart is None else one.scores_apart for one in (self, other))
        return SteeringPass((*self.steered, *other.steered), (*self.repaired, *other.repaired), apart)

    @property
    def worth_it(self) -> bool:
        """Whether it is cheaper than the passes that were joined into it."""
        return self.tokens <= PREFILL_CHUNK and self.scores <= _WORTH_JOINING * (self.scores_apart or self.scores)


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

    def passes(self, edit: Edit) -> list[SteeringPass]:
        """The forwards that `apply` runs. Spans are steered from left to right: each sees what is before it as it is then.

        With the whole prefix every span has a pass of its own, as in a prefill in chunks, so that an eraser that does
        nothing changes not even a bit.
        """
        eraser = self._eraser(edit)
        window = None if self.full_prefix else eraser.window if self.window is None else self.window
        passes: list[SteeringPass] = []
        for span, runs in edit.neighbors(self._repair(edit)):
            for turn in _turns(span, runs, window):
                if passes and window is not None and (both := passes[-1].joined(turn)).worth_it:
                    passes[-1] = both
                else:
                    passes.append(turn)
        return passes

    def apply(self, edit: Edit) -> Outcome:
        eraser = self._eraser(edit)
        written = recomputed = 0
        for turn in self.passes(edit):
            steering_model = eraser.attached(edit.model, first=turn.tokens_steered if turn.repaired else None)
            written += rewrite_runs(steering_model, edit.cache, edit.tokens, turn.rewrites)
            recomputed += turn.tokens
        steered = tuple(Steered.mark(edit.cache, span) for span in edit.spans)
        marks = edit.marks.contaminated(edit.spans[0].start).steer(steered)
        return Outcome(marks, steered=edit.spans, tokens_recomputed=recomputed, bytes_written=written)


def _turns(span: Span, runs: tuple[Span, ...], window: Window | None) -> Iterator[SteeringPass]:
    """A span in chunks, as a prefill would compute it, the last one together with what is repaired behind it."""
    before = window_spans(window, span.start)
    for start, end in pairwise([*range(span.start, span.end, PREFILL_CHUNK), span.end]):
        earlier = (Span(span.start, start),) if start > span.start else ()
        chunk = Rewrite((Span(start, end),), (*before, *earlier))
        repaired = (Rewrite(runs, before, gap=span),) if runs and end == span.end else ()
        yield SteeringPass((chunk,), repaired)
