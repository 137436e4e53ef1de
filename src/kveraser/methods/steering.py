"""KVEraser: replace the span's keys and values, and recompute what has read them.

Li et al., "KVEraser: Learning to Steer KV Cache for Efficient Localized Context Erasing" (arXiv 2606.17034): steering
states, made by a LoRA on the same model, stand in the span's slots, and nothing moves. The suffix keeps what it saw of the
span. What that is sits in the few tokens that attended to it, so these are recomputed, in place and as if the span had
never been there; that is ours. A neutral eraser writes states that nothing attends to, and needs no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kveraser.cache import (
    PREFILL_CHUNK,
    Can,
    Eraser,
    Repair,
    Rewrite,
    Window,
    slots_of,
    window_spans,
)
from kveraser.eraser import CHOICES, Choose, KVEraser
from kveraser.errors import OptionError
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.choice import Choice
from kveraser.methods.choosing import Wish, calibration_of, choose_readers
from kveraser.methods.full_recompute import FullRecompute
from kveraser.methods.slots import runs_of
from kveraser.readers import readers_for
from kveraser.spans import Span, union_spans

_WORTH_JOINING = 2.0
"""How much more attention than apart spans may cost in one pass: a pass has a price of its own (`docs/performance.md`)."""
_GAP_OPEN = "this model's keys cannot be moved, so the recomputed tokens see the gap that the span leaves in positions"


@dataclass(frozen=True)
class SteeringPass:
    """One forward: tokens that the eraser re-encodes, and behind them tokens that the plain model recomputes.

    Attributes:
        steered, repaired: these tokens.
        scores_apart: attention scores per head of the passes that were joined into this one; None if none were.
    """

    steered: tuple[Rewrite, ...] = ()
    repaired: tuple[Repair, ...] = ()
    scores_apart: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that run through the model."""
        return self.tokens_steered + sum(map(len, self.repaired))

    @property
    def tokens_steered(self) -> int:
        """Those of them under the eraser."""
        return sum(map(len, self.steered))

    @property
    def columns(self) -> int:
        """Keys in the attention of every token, at most."""
        shown = [run for rewrite in self.steered for run in (*rewrite.sees, rewrite.slots)]
        return sum(map(len, union_spans((*shown, *(run for repair in self.repaired for run in runs_of(repair.sees))))))

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
class SteeringPlan(Plan):
    """A plan that says in which forwards the tokens will run."""

    passes: tuple[SteeringPass, ...] = ()


@dataclass(frozen=True)
class Steering(EraseMethod):
    """Write steering states into the spans' own slots, and recompute the tokens that have read the spans.

    Args:
        eraser: a LoRA eraser or a neutral one; None takes that of the context or the model's own (`default_eraser`).
        window: `(sink, local)` slots that the eraser's pass attends to before its tokens; None takes what the eraser was
            trained with. A window of (0, 0) shows it the span alone.
        full_prefix: attend to the whole prefix, whatever the eraser was trained with.
        repair: afterwards recompute so many live tokens per span with the unchanged model, in place and as if no span had
            ever been there; None takes the eraser's own, and where that has none, as many as a span of its length deserves
            (`readers.how_many`).
        choose: which tokens: "readers" are those whose attention went to the spans, over all spans together, always the first 8
            behind each, and one in ten by what the tokens before it have read (`readers.choice`); "next" are the first ones behind each span, in the eraser's window. None takes the eraser's own.
        coverage: readers only: stop when so much of the attention that went to the spans is covered, such as 0.95.
        block: readers only: choose whole runs on multiples of so many slots. None takes single tokens, or runs of 16 where the
            backend can run nothing else.
        keys: readers only: how many slots a recomputed token is shown at least of those that it attends to most, besides the
            sink, the nearest ones and its fellows (samples stand for all others); None shows it everything, and so does a
            backend that runs nothing but runs.
    """

    eraser: KVEraser | None = None
    window: Window | None = None
    full_prefix: bool = False
    repair: int | None = None
    choose: Choose | None = None
    coverage: float | None = None
    block: int | None = None
    keys: int | None = 512

    name: ClassVar[str] = "kveraser"
    summary: ClassVar[str] = "replace the span's states, recompute the tokens that have read it"
    needs: ClassVar[frozenset[Can]] = frozenset({Can.STEER})
    needs_eraser: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    compared_at_nothing: ClassVar[bool] = True
    budget_option: ClassVar[str | None] = "repair"

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 0:
            raise OptionError(f"window={self.window} must be two counts (sink, local) of at least 0")
        if self.choose is not None and self.choose not in CHOICES:
            raise OptionError(f"choose={self.choose!r} must be one of {', '.join(CHOICES)}")
        if self.choose == "next" and (self.coverage is not None or self.block is not None):
            raise OptionError("coverage and block choose among readers; with choose='next' there is nothing to choose")
        Wish(1 << 30 if self.repair is None else self.repair, self.coverage, self.block, self.keys)

    def using(self, edit: Edit) -> Eraser:
        """The eraser that an edit will use.

        Raises:
            EraserMismatchError: it was made for another model.
        """
        found = self.eraser or edit.find_eraser()
        edit.backend.check_eraser(found)
        return found

    def _repair(self, edit: Edit) -> int | None:
        return self.using(edit).repair if self.repair is None else self.repair

    def _counts(self, edit: Edit) -> tuple[int, ...]:
        """How many tokens an edit recomputes for each of its spans."""
        return readers_for(edit.said, self._repair(edit))

    def budget(self, edit: Edit) -> int:
        """How many tokens an edit recomputes behind its spans, together, at most."""
        return sum(self._counts(edit))

    def chooses(self, edit: Edit) -> Choose:
        """Which tokens it recomputes.

        Raises:
            OptionError: readers were asked for, and the backend cannot tell them.
        """
        found: Choose = self.choose or self.using(edit).choose
        if found == "readers" and not edit.backend.can >= {Can.TELL, Can.RUNS}:
            raise OptionError(f"choose='readers' cannot be done in {edit.backend.name}'s cache; use choose='next'")
        return found

    def chosen(self, edit: Edit) -> EraseMethod:
        """Longer text moves what is behind it. Where that is no more than would be recomputed anyway, all of it is, exactly."""
        behind = edit.length - edit.spans[0].end if edit.spans else 0
        return FullRecompute() if edit.growth and 0 < behind <= self.budget(edit) else self

    def plan(self, edit: Edit) -> SteeringPlan:
        choice = None
        if self.chooses(edit) == "next":
            written = edit.runs_behind(self._counts(edit))
        else:
            wish = Wish(self._repair(edit), self.coverage, self.block, self.keys)
            choice = choose_readers(edit, wish, self.using(edit).calibration)
            written = choice.runs if choice else ()
        passes = tuple(self.passes(edit, choice))
        changed = [edit.backend.check_rewrite(turn.steered, turn.repaired) for turn in passes]
        return SteeringPlan(min([edit.length, *changed]), (*edit.spans, *written), choice, passes)

    def passes(self, edit: Edit, choice: Choice | None = None) -> list[SteeringPass]:
        """The forwards that `apply` runs. New tokens are computed first, where their forward can be that of the readers as well; spans
        are steered from left to right: each sees what is before it as it is then.

        With the whole prefix every span has a pass of its own, as in a prefill in chunks, so that an eraser that does
        nothing changes not even a bit. The readers go with the last pass: they never see what is steered.
        """
        eraser = self.using(edit)
        window = None if self.full_prefix else eraser.window if self.window is None else self.window
        passes = _new_tokens(edit) if edit.fresh and self._joins(edit) else []
        none = (0,) * len(edit.spans)
        behind = edit.neighbors(self._counts(edit) if self.chooses(edit) == "next" else none)
        shown = None if eraser.steers_spans else edit.after
        for (span, runs), new in zip(behind, edit.new or none, strict=True):
            for turn in _turns(edit, span, new, runs, window, shown):
                if passes and window is not None and (both := passes[-1].joined(turn)).worth_it:
                    passes[-1] = both
                else:
                    passes.append(turn)
        if choice is not None:
            most = min(edit.backend.chunk, PREFILL_CHUNK)  # of a pass that has other tokens as well
            for part in choice.repair(edit.absent).parts(edit.backend.chunk):  # every gap is closed, and none is seen
                readers = SteeringPass(repaired=(part,))
                if passes and passes[-1].tokens + readers.tokens <= most:
                    passes[-1] = passes[-1].joined(readers)
                else:
                    passes.append(readers)
        return passes

    def _joins(self, edit: Edit) -> bool:
        """Whether new tokens are run together with others, as if nothing had been hidden before them."""
        return Can.REPAIR in edit.backend.can and not self.using(edit).steers_readers

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        assert isinstance(plan, SteeringPlan)
        eraser, choice, backend = self.using(edit), plan.choice, edit.backend
        alone = () if self._joins(edit) else edit.fresh
        written = sum(backend.recompute(edit.tokens, run) for run in alone)
        for turn in plan.passes:
            written += backend.rewrite(edit.tokens, turn.steered, turn.repaired, eraser)
        if (
            edit.spare and not eraser.steers_spans
        ):  # last, so that an engine puts new states into the very places of the old ones
            known = partial(calibration_of, edit, eraser.calibration)
            written += eraser.hide(backend, edit.tokens, edit.spare, known)
        runs = tuple(run for run in plan.in_place if run not in edit.spans)
        notes = choice.notes if choice else ()
        if runs and edit.spare and not backend.closes_gaps:
            notes = (*notes, _GAP_OPEN)
        changed_from = min(edit.spans[0].start, plan.layout_from)
        return Outcome(
            marks=edit.marks.contaminated(changed_from).steer(tuple(map(backend.steered, edit.spare))),
            steered=edit.spare,
            recomputed=runs,
            tokens_recomputed=sum(turn.tokens for turn in plan.passes) + sum(map(len, alone)),
            bytes_written=written,
            residual=choice.residual if choice else None,
            eraser=eraser.kind if edit.spare else None,
            notes=notes,
        )


def _new_tokens(edit: Edit) -> list[SteeringPass]:
    """New tokens in chunks, each behind all that is before it but what is hidden."""
    shown = edit.after
    passes: list[SteeringPass] = []
    for run in edit.fresh:
        for start in range(run.start, run.end, PREFILL_CHUNK):
            part = Span(start, min(start + PREFILL_CHUNK, run.end))
            repair = Repair(slots_of((part,), shown.device), shown[shown < part.end], edit.absent)
            turn = SteeringPass(repaired=(repair,))
            if passes and passes[-1].tokens + turn.tokens <= PREFILL_CHUNK:
                passes[-1] = passes[-1].joined(turn)
            else:
                passes.append(turn)
    return passes


def _turns(
    edit: Edit, span: Span, new: int, runs: tuple[Span, ...], window: Window | None, shown: Tensor | None
) -> Iterator[SteeringPass]:
    """What `new` tokens leave of a span, in chunks as a prefill would compute it, the last one together with what is repaired next
    behind it.

    Args:
        shown: where nothing is steered, the slots that may be seen: all spans are hidden only when everything has run.
    """
    first, device = span.start + new, edit.tokens.ids.device
    before = window_spans(window, first)
    spare = (Span(first, span.end),) if first < span.end else ()
    slots, sees = slots_of(runs, device), slots_of((*before, *runs), device)
    if shown is not None:
        repair = Repair(slots, sees[torch.isin(sees, shown)], edit.absent)
        yield from (SteeringPass(repaired=(part,)) for part in repair.parts(edit.backend.chunk) if runs)
        return
    repaired = (Repair(slots, sees, spare),) if runs else ()
    if not spare:
        if repaired:
            yield SteeringPass(repaired=repaired)
        return
    for start, end in pairwise([*range(first, span.end, PREFILL_CHUNK), span.end]):
        earlier = (Span(first, start),) if start > first else ()
        yield SteeringPass((Rewrite(Span(start, end), (*before, *earlier)),), repaired if end == span.end else ())
