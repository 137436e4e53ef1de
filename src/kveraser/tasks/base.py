"""What a data task is: a maker of examples of a span that has to leave the context.

Knows: text, random numbers. Does not know about models, caches, training or metrics.

Templates, names and values of the two splits are disjoint: an eraser is never judged on a sentence it has seen.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kveraser.tasks.filler import Filler
from kveraser.tasks.splits import Split

NOT_SAID = "The text does not say."


@dataclass(frozen=True)
class EraseExample:
    """One example. The context is `prefix + span + suffix`; the span is erased; then (or before) the question comes.

    Attributes:
        prefix, span, suffix: text.
        question: text.
        gold: the right answer without the span; None when the text then does not say.
        erased: the answer that only the span supports; None when it has none.
        continuation: text that goes on naturally after the suffix.
    """

    prefix: str
    span: str
    suffix: str
    question: str
    gold: str | None
    erased: str | None
    continuation: str = ""

    @property
    def answer(self) -> str:
        """The gold answer, or a sentence that says that there is none."""
        return self.gold or NOT_SAID


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens to draw from, each `(least, most)`."""

    prefix: tuple[int, int] = (32, 160)
    suffix: tuple[int, int] = (32, 256)


def frame_question(question: str) -> str:
    """The form in which questions are put behind a context."""
    return f"\n\nQuestion: {question}\nAnswer:"


class Task(ABC):
    """A maker of examples, deterministic by seed."""

    name: ClassVar[str]

    def examples(self, filler: Filler, sizes: Sizes, split: Split, seed: int) -> Iterator[EraseExample]:
        """Endless examples of a split; the same seed gives the same ones."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            yield self.make(rng, filler, sizes, split)

    @abstractmethod
    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        """One example."""


def halves(items: Sequence[str]) -> Callable[[Split], Sequence[str]]:
    """Deal items to the two splits: two thirds to train on, one third to judge by, nothing to both."""
    return lambda split: [item for index, item in enumerate(items) if (index % 3 == 2) == (split == "eval")]


def draw(rng: random.Random, bounds: tuple[int, int]) -> int:
    """A length within bounds, both included."""
    return rng.randint(*bounds)
