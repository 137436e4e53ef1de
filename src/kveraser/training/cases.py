"""Lessons with the states of their contexts, and the cases that come of them.

Knows: the frozen model, packed rows. Does not know about erasers or losses.

A *case* is one erase at one moment: with nothing behind the context, or with one of the lesson's questions there already,
whose tokens may have read the span, too. Cases of the same erase share its steering states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kveraser.spans import Span
from kveraser.training.lessons import Erase, Lesson, Probe
from kveraser.training.rows import Segment, States, run_row, slot_range


@dataclass(frozen=True)
class Case:
    """One erase at one moment.

    Attributes:
        lesson: whose context it is.
        number: of the erase, counted over all lessons.
        erase: what is erased.
        ids: `(n,)` int64, the tokens that are there.
        slots: `(n,)` int64, the slots of their states.
        probes: what is asked then.
    """

    lesson: Lesson
    number: int
    erase: Erase
    ids: Tensor
    slots: Tensor
    probes: tuple[Probe, ...]


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
    asked: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, lessons: Sequence[Lesson], states: States) -> Prefilled:
        """Lessons with their states as `prefill` lays them out: each one's context, then its questions."""
        at, context, asked = 0, [], []
        for lesson in lessons:
            context.append(Span(at, at + len(lesson.ids)))
            at = context[-1].end
            found = []
            for question in lesson.questions:
                found.append(slot_range(at, at + len(question) - 1))
                at += len(question) - 1
            asked.append(tuple(found))
        return cls(tuple(lessons), states, tuple(context), tuple(asked))

    @property
    def slots(self) -> int:
        """How many there are."""
        return int(self.states[0][0].shape[-2])

    @property
    def erases(self) -> list[tuple[int, Erase]]:
        """All erases, each with the index of its lesson."""
        return [(index, erase) for index, lesson in enumerate(self.lessons) for erase in lesson.erases]

    @property
    def cases(self) -> list[Case]:
        """All cases, those of an erase one behind the other."""
        found = []
        for number, (index, erase) in enumerate(self.erases):
            lesson, context = self.lessons[index], self.context[index]
            for question, probes in erase.moments:
                ids, slots = torch.tensor(lesson.ids), slot_range(context.start, context.end)
                if question is not None:
                    ids = torch.cat([ids, torch.tensor(lesson.questions[question][:-1], dtype=torch.long)])
                    slots = torch.cat([slots, self.asked[index][question]])
                found.append(Case(lesson, number, erase, ids, slots, probes))
        return found


@torch.no_grad()
def prefill(model: nn.Module, lessons: Sequence[Lesson]) -> Prefilled:
    """Run the contexts, and behind them every question, through the frozen model."""
    row: list[Segment] = []
    at = 0
    for lesson in lessons:
        row.append(Segment.run(lesson.ids, 0, slot_range(0, 0)))
        own = slot_range(at, at + len(lesson.ids))
        row += [Segment.run(asked[:-1], len(lesson.ids), own) for asked in lesson.questions if len(asked) > 1]
        at = sum(map(len, row))
    return Prefilled.of(lessons, run_row(model, row, [])[1])
