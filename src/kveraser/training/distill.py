"""From lessons to a loss: what the eraser's pass is judged by.

Knows: models, caches as constants, the eraser. Does not know about optimisers or where lessons come from.

Notation of METHOD: the context is `P ++ S ++ X`. The frozen model prefills it once for all erases of a lesson. Then, for
all erases at once, the eraser re-encodes `S` (with gradients, from the window of `P` that it will see later), and its
keys and values stand in `S`'s slots; with `repair`, the frozen model runs the first tokens of `X` again, as if they stood
right behind `P`, and their keys are moved to their places. All probes are judged in one forward, each attending to its
context alone. The teacher does the same on `P ++ X`. Several lessons are packed into the same forwards, since a short one
alone cannot keep a processor busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from kveraser.cache import Window, window_spans
from kveraser.model.rope import frequencies, rotary_layout, rotate
from kveraser.model.view import causal_lm
from kveraser.spans import Span, gaps
from kveraser.training.lessons import Erase, Lesson, Probe, Weights
from kveraser.training.rows import Segment, States, places_of, run_row, spans_of

PACK_TOKENS = 640
"""Tokens per forward that packing aims at: more of them make attention between strangers dearer than it saves."""


def pack(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Lessons in groups that fit one forward, in order."""
    group: list[Lesson] = []
    for lesson in lessons:
        if group and sum(len(other.ids) for other in (*group, lesson)) > PACK_TOKENS:
            yield group
            group = []
        group.append(lesson)
    if group:
        yield group


@dataclass(frozen=True)
class Judgement:
    """Logits over all target tokens of some lessons, `(tokens, vocab)`, and what is known of these tokens.

    Attributes:
        teacher, student: logits; gradients flow through the student's.
        targets: `(tokens,)` ids.
        gold: `(tokens,)` bool, targets of gold answers.
        probes: the probes that the targets belong to, in order.
    """

    teacher: Tensor
    student: Tensor
    targets: Tensor
    gold: Tensor
    probes: tuple[Probe, ...]

    def per_token(self, weights: Weights) -> Tensor:
        """`(tokens,)`: a weight for each target."""
        return torch.tensor(
            [weights[probe.kind] for probe in self.probes for _ in probe.targets], device=self.targets.device
        )


@dataclass(frozen=True)
class Prefilled:
    """Lessons with the states of their contexts and of their questions (all but each one's last token).

    Attributes:
        states: per layer, keys and values of everything.
        context: for each lesson, the slots of its context.
        asked: for each lesson and question, its slots.
    """

    lessons: tuple[Lesson, ...]
    states: States
    context: tuple[Span, ...]
    asked: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def erases(self) -> list[tuple[int, Erase]]:
        """All erases, each with the index of its lesson."""
        return [(index, erase) for index, lesson in enumerate(self.lessons) for erase in lesson.erases]


@torch.no_grad()
def prefill(model: nn.Module, lessons: Sequence[Lesson]) -> Prefilled:
    """Run the contexts, and behind them every question, through the frozen model."""
    row: list[Segment] = []
    at, context = 0, list[Span]()
    asked: list[list[tuple[int, int]]] = []
    for lesson in lessons:
        context.append(Span(at, at + len(lesson.ids)))
        row.append(Segment(lesson.ids, 0, ()))
        at = context[-1].end
        asked.append([])
        for question in lesson.questions:
            if len(question) > 1:
                row.append(Segment(question[:-1], len(lesson.ids), (context[-1],)))
            asked[-1].append((at, at + len(question) - 1))
            at = asked[-1][-1][1]
    _, states = run_row(model, row, [])
    return Prefilled(tuple(lessons), states, tuple(context), tuple(tuple(slots) for slots in asked))


def _target_logits(model: nn.Module, hidden: Tensor, ends: Sequence[int], probes: Sequence[Probe]) -> Tensor:
    """Logits of the target tokens of probes that end at these places of a row."""
    wanted = [hidden[end - len(probe.targets) : end] for end, probe in zip(ends, probes, strict=True)]
    logits: Tensor = causal_lm(model).get_output_embeddings()(torch.cat(wanted))
    return logits


def _whole(lesson: Lesson, probe: Probe) -> Probe:
    """The probe as the teacher has to answer it: with its question, whether or not that was cached."""
    if probe.cached is None:
        return Probe(probe.ids, probe.targets)
    return Probe((*lesson.questions[probe.cached][:-1], *probe.ids), probe.targets)


@torch.no_grad()
def teach(model: nn.Module, prefilled: Prefilled) -> Tensor:
    """Logits of full recomputation over all target tokens of the lessons, `(tokens, vocab)`."""
    slots = prefilled.states[0][0].shape[-2]
    row: list[Segment] = []
    waiting: list[tuple[int, Probe, int]] = []  # erase, probe, where in the row its segment is
    answers: dict[tuple[int, Probe], Tensor] = {}

    def run() -> None:
        hidden, _ = run_row(model, row, [prefilled.states])
        places = places_of(row)
        probes = [probe for _, probe, _ in waiting]
        logits = _target_logits(model, hidden, [places[index].end for _, _, index in waiting], probes)
        parts = logits.split([len(probe.targets) for probe in probes])
        answers.update({(number, probe): part for (number, probe, _), part in zip(waiting, parts, strict=True)})
        row.clear()
        waiting.clear()

    for number, (index, erase) in enumerate(prefilled.erases):
        lesson, context = prefilled.lessons[index], prefilled.context[index]
        start = erase.spans[0].start
        rest = [token for kept in gaps(erase.spans, len(lesson.ids), start) for token in lesson.ids[kept.slice]]
        tokens = sum(len(segment.ids) for segment in row)
        if row and tokens + len(rest) > PACK_TOKENS:
            run()
            tokens = 0
        seen = spans_of((context.start, context.start + start))
        if rest:
            row.append(Segment(rest, start, seen))
            seen = (*seen, Span(slots + tokens, slots + tokens + len(rest)))
        for probe in dict.fromkeys(_whole(lesson, probe) for probe in erase.probes):  # one answer in both protocols
            waiting.append((number, probe, len(row)))
            row.append(Segment(probe.ids, start + len(rest), seen))
    run()
    return torch.cat(
        [
            answers[number, _whole(prefilled.lessons[index], probe)]
            for number, (index, erase) in enumerate(prefilled.erases)
            for probe in erase.probes
        ]
    )


class _Edited:
    """An erased context: which slot holds the state of each of its positions."""

    def __init__(self, context: Span) -> None:
        self.slots = list(context)

    def move(self, span: Span, to: int) -> None:
        """The states of the positions `span` are now in slots from `to` on."""
        self.slots[span.slice] = range(to, to + len(span))

    def seen(self, *runs: Span) -> tuple[Span, ...]:
        """The slots that hold the positions in `runs`, as spans."""
        slots = sorted(slot for run in runs for slot in self.slots[run.slice])
        starts = [slot for index, slot in enumerate(slots) if not index or slots[index - 1] != slot - 1]
        ends = [slot + 1 for index, slot in enumerate(slots) if index + 1 == len(slots) or slots[index + 1] != slot + 1]
        return spans_of(*zip(starts, ends, strict=True))


@dataclass(frozen=True)
class Variant:
    """Other ways to steer, for ablations; erasing itself does not offer them.

    Attributes:
        placeholder: an id to run in place of each of the span's own. An eraser that is as good without seeing what it
            erases has only learnt to be neutral.
        suffix_aware: the span also attends to the cached suffix, where it can see what it has left behind.
    """

    placeholder: int | None = None
    suffix_aware: bool = False


def judge(
    model: nn.Module,
    steering_model: nn.Module,
    prefilled: Prefilled,
    teacher: Tensor,
    *,
    window: Window | None,
    repair: int = 0,
    variant: Variant = Variant(),
) -> Judgement:
    """Erase what the lessons say and compare what the model then says with the teacher.

    Args:
        model: the frozen backbone.
        steering_model: a view of it with the eraser attached.
        teacher: from `teach`.
        window: what of the context before them the spans attend to, and so do the tokens that are repaired.
        repair: tokens behind each span to run again with the frozen model, as if the span were not there.
        variant: another way to steer.
    """
    erases = prefilled.erases
    edited = [_Edited(prefilled.context[index]) for index, _ in erases]
    past, slots = [prefilled.states], int(prefilled.states[0][0].shape[-2])

    def rewrite(runs: Sequence[tuple[int, Segment, Span]], with_model: nn.Module) -> States:
        """Run segments, and let their erases see the places `Span` in their new states from now on."""
        nonlocal slots
        for number, segment, place in runs:
            edited[number].move(place, slots)
            slots += len(segment.ids)
        return run_row(with_model, [segment for _, segment, _ in runs], past)[1]

    targets = [_targets(erase.spans, repair, len(prefilled.lessons[index].ids)) for index, erase in erases]
    for turn in zip_longest(*targets):  # from left to right: a span sees what is before it as it is by then
        steered, repaired, steps = [], [], list[int]()
        for number, target in enumerate(turn):
            if target is None:
                continue
            (span, near), ids = target, prefilled.lessons[erases[number][0]].ids
            before = window_spans(window, span.start)
            visible = (*before, *spans_of((span.end, len(ids)))) if variant.suffix_aware else before
            run = ids[span.slice] if variant.placeholder is None else (variant.placeholder,) * len(span)
            steered.append((number, Segment(run, span.start, edited[number].seen(*visible)), span))
            if near is not None:
                repaired.append((number, Segment(ids[near.slice], span.start, edited[number].seen(*before)), near))
                steps += [len(span)] * len(near)
        past.append(rewrite(steered, steering_model))
        if repaired:
            with torch.no_grad():
                past.append(_moved(model, rewrite(repaired, model), steps))

    row = []
    for (index, erase), context in zip(erases, edited, strict=True):
        length = len(prefilled.lessons[index].ids)
        seen = context.seen(Span(0, length))
        for probe in erase.probes:
            a, b = (0, 0) if probe.cached is None else prefilled.asked[index][probe.cached]
            row.append(Segment(probe.ids, length + b - a, (*seen, *spans_of((a, b)))))
    hidden, _ = run_row(model, row, past)
    probes = tuple(probe for _, erase in erases for probe in erase.probes)
    student = _target_logits(model, hidden, [place.end for place in places_of(row)], probes)
    return Judgement(
        teacher,
        student,
        torch.tensor([token for probe in probes for token in probe.targets], device=student.device),
        torch.tensor([probe.gold for probe in probes for _ in probe.targets], device=student.device),
        probes,
    )


def _targets(spans: Sequence[Span], count: int, length: int) -> list[tuple[Span, Span | None]]:
    """Each span with the first `count` tokens behind it, up to the next one; None where there are none."""
    ends = [*(span.start for span in spans[1:]), length]
    return [
        (span, next(iter(spans_of((span.end, min(span.end + count, end)))), None))
        for span, end in zip(spans, ends, strict=True)
    ]


def _moved(model: nn.Module, states: States, steps: Sequence[int]) -> States:
    """States with their keys moved by so many positions each, as erasing does for what it repairs behind a span."""
    layout, inv_freq, delta = rotary_layout(model), frequencies(model), torch.tensor([steps])
    return [
        (rotate(keys, delta, inv_freq, layout.pairing) if rotary else keys, values)
        for rotary, (keys, values) in zip(layout.rotary, states, strict=True)
    ]
