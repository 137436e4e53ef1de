"""Which forwards an erase takes in an engine that only knows prompts, and where their keys go.

Knows: integers (slots, positions). Does not know about vLLM, files, HTTP or tensors.

In transformers a windowed pass runs tokens at their own positions with a hole between the shown slots. A prompt has no
holes: its tokens stand at 0, 1, 2, ... So a pass is written as a compact prompt, shown slots first, and what a rotary
embedding needs is made up for by moving keys:

    context    [0 sink) ........ [start - local, start) [start, end) ....
    prompt     [ sink ][  local  ][ tokens ]               a token at position p stands at p - shift
    shown keys are moved by -shift, so that every distance is the real one (a sink key may stand before position 0),
    kept keys are moved from where they were computed to the slots they are for.

Readers of a span are run in their own slots instead, behind all that stays: the span's slots hold states that nothing attends
to. The keys before it may be moved up to it, so that the gap is closed for these tokens. Nothing that is kept is moved: what is
moved is a copy of what the pass reads.

    context    [ before ][ span ][ between ][ run )
    prompt     [ before, moved up ][ hidden ][ between ][ run )
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kveraser.cache import Window, window_spans
from kveraser.methods.slots import neighbors
from kveraser.spans import Span


@dataclass(frozen=True)
class Pass:
    """One forward over the tokens of some slots.

    Attributes:
        eraser: whether the eraser is active.
        shown: slots that the tokens attend to, in prompt order, each with the positions to move its keys by.
        run: the slots whose tokens run, and whose states are kept.
        kept_move: positions to move the new keys by before they go into their slots.
    """

    eraser: bool
    shown: tuple[tuple[Span, int], ...]
    run: Span
    kept_move: int

    @property
    def seen(self) -> int:
        """Number of shown slots: where the tokens stand in the prompt."""
        return sum(len(span) for span, _ in self.shown)


def erasing_passes(
    spans: tuple[Span, ...], steered: tuple[Span, ...], length: int, window: Window | None, repair: int
) -> Iterator[Pass]:
    """The passes that erase `spans` by steering, from left to right; each reads what the ones before it have written.

    Args:
        spans: slots to erase, sorted and disjoint.
        steered: slots that hold steering states already.
        length: number of slots.
        window: `(sink, local)` slots a pass attends to before its tokens; None for all.
        repair: live tokens behind each span that are computed again, as if the span were absent.
    """
    for span, runs in neighbors(spans, steered, length, [repair] * len(spans)):
        before = tuple((run, 0) for run in window_spans(window, span.start))
        yield _pass(True, before, span, 0)
        gap = len(span)
        for number, run in enumerate(runs):
            yield _pass(False, (*before, *((done, -gap) for done in runs[:number])), run, gap)


def reader_passes(runs: tuple[Span, ...], absent: tuple[Span, ...], close: bool) -> Iterator[Pass]:
    """The passes that compute runs of tokens again, each as if no absent slot had ever been there.

    Args:
        runs: in order.
        absent: slots that are erased, in order; they are shown, with hidden states in them.
        close: whether the gaps that these leave are closed; else they are seen, and no key is moved.
    """
    for run in runs:
        yield Pass(False, stretches(absent, run.start, close), run, 0)


def stretches(absent: tuple[Span, ...], end: int, close: bool) -> tuple[tuple[Span, int], ...]:
    """The slots before `end`, in order: each stretch with the positions to move its keys by for those who look from there on.

    Args:
        absent: slots that are erased, in order; they stay where they are.
        close: whether what is before a gap moves up to it.
    """
    before = [span for span in absent if span.end <= end]
    found, at, gap = [], 0, sum(map(len, before)) if close else 0
    for span in before:
        if span.start > at:
            found.append((Span(at, span.start), gap))
        found.append((span, 0))
        at, gap = span.end, gap - len(span) if close else 0
    if end > at:
        found.append((Span(at, end), 0))
    return tuple(found)


def _pass(eraser: bool, shown: tuple[tuple[Span, int], ...], run: Span, gap: int) -> Pass:
    seen = sum(len(span) for span, _ in shown)
    shift = run.start - gap - seen
    return Pass(eraser, tuple((span, move - shift) for span, move in shown), run, shift + gap)
