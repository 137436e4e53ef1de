"""Which lessons a stage learns from, and in which order.

Knows: seeds, numbers, lessons. Does not know about models.

Lessons are numbered. Each is drawn by (seed, stage, split, number) alone, so that a resumed run sees what an uninterrupted one
would, any number of processes share the lessons of a step, and runs with other batches or erasers learn from the same ones. An
epoch takes all of them once, from the second on in an order of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kveraser.tasks import Filler, Split
from kveraser.training.config import Stage, StageName
from kveraser.training.lessons import Encode, Lesson, LessonPlan


@dataclass(frozen=True)
class Drawn:
    """A lesson.

    Attributes:
        split: of the data.
        number: in it.
        repair: readers of each span that are computed again.
    """

    lesson: Lesson
    split: Split = "train"
    number: int = 0
    repair: int = 0


class Draws:
    """The lessons of a stage.

    Args:
        repair: what the eraser repairs by default.
    """

    def __init__(
        self, seed: int, name: StageName, stage: Stage, repair: int, plan: LessonPlan, filler: Filler, encode: Encode
    ) -> None:
        self.name, self.stage, self.seed, self.repair = name, stage, seed, repair
        self.plan, self.filler, self.encode = plan, filler, encode
        self.size = lessons_of(stage)
        self._order = lru_cache(2)(self._shuffled)

    def lesson(self, split: Split, number: int) -> Lesson:
        """The lesson of that number."""
        rng = random.Random(
            f"{self.seed}/{self.name}/{split}/0/{number}"
        )  # the 0 keeps earlier versions' held-out lessons
        return self.plan.make(rng, self.filler, self.encode, split)

    def held_out(self, numbers: Iterable[int]) -> list[Drawn]:
        """Lessons to validate on."""
        return [Drawn(self.lesson("eval", number), "eval", number, self.repair) for number in numbers]

    def of_step(self, step: int, places: Iterable[int]) -> list[Drawn]:
        """The lessons at some places of a step, which has `contexts` of them; `repair` takes turns by their numbers."""
        repairs = self.stage.repair or (self.repair,)
        found = []
        for place in places:
            epoch, at = divmod(step * self.stage.contexts + place, self.size)
            number = self._order(epoch)[at]
            found.append(Drawn(self.lesson("train", number), "train", number, repairs[number % len(repairs)]))
        return found

    def _shuffled(self, epoch: int) -> Sequence[int]:
        if not epoch:
            return range(self.size)
        order = list(range(self.size))
        random.Random(f"{self.seed}/{self.name}/order/{epoch}").shuffle(order)
        return order


def lessons_of(stage: Stage) -> int:
    """How many lessons a stage learns from, each of them once an epoch."""
    return -(-stage.steps * stage.contexts // stage.epochs)


def pack(drawn: Sequence[Drawn], most: int) -> Iterator[list[Drawn]]:
    """Lessons of the same `repair` in groups that fit one forward of `most` tokens, otherwise in order."""
    for repair in dict.fromkeys(one.repair for one in drawn):
        group: list[Drawn] = []
        for one in drawn:
            if one.repair != repair:
                continue
            if group and sum(len(other.lesson.ids) for other in (*group, one)) > most:
                yield group
                group = []
            group.append(one)
        yield group
