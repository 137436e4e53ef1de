"""What a data task is: a maker of examples of a span that has to leave the context.

Knows: text, random numbers. Does not know about models, caches, training or metrics.

Templates, names and values of the two splits are disjoint: an eraser is never judged on a sentence it has seen. An author of a task
needs nothing but this module and, where they help, `facts` and `words`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kveraser.errors import OptionError
from kveraser.tasks.filler import Filler
from kveraser.tasks.splits import Split

__all__ = [
    "EraseExample",
    "Filler",
    "Markup",
    "Piece",
    "Sizes",
    "Split",
    "Task",
    "Turn",
    "ask",
    "asked",
    "halves",
    "in_fields",
    "transcript",
]

Piece = tuple[str, bool]
"""A text of the context, with whether it is to be erased."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, in pieces."""

    role: Literal["user", "assistant"]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Markup:
    """How a question is written behind an example's context in a chat.

    Attributes:
        opening: what comes before the user's words.
        closing: what comes behind them: the end of the message, and what the assistant's reply begins with.
        between: what comes before the user's words if a question was asked already: it ends the reply that was begun.
        words: the user's words of the example's own question.
        lead: the beginning of the reply; may be empty.
    """

    opening: str
    closing: str
    between: str
    words: str
    lead: str


@dataclass(frozen=True)
class EraseExample:
    """One example. The context is `prefix + span + suffix`; the span is erased; then (or before) the question comes.

    Attributes:
        prefix, span, suffix: text.
        question: text, exactly as it stands behind the context (see `ask`).
        gold: the right answer without the span, or with what is said instead; None when the text then does not say.
        erased: the answer that only the span supports; None when it has none.
        continuation: text that goes on naturally after the suffix.
        further: more spans to erase together with the first, each with the text that follows it; they stand behind
            `suffix`.
        new: what the span is to say instead, where it is replaced; None where it is erased.
        turns: the context as a conversation, for the chat form: user and assistant in turns, the assistant last; none
            where it is one text that a user gives to read.
        request: the question as a user's message and the beginning of the reply (or nothing), for the chat form, where it is
            no question that `ask` framed.
        gap: what stands between the question and its answer.
        chat: how questions are written if the texts are a chat's, its template's markup included (see `chat.py`); else None.
    """

    prefix: str
    span: str
    suffix: str
    question: str
    gold: str | None
    erased: str | None
    continuation: str = ""
    further: tuple[tuple[str, str], ...] = ()
    new: str | None = None
    turns: tuple[Turn, ...] = ()
    request: tuple[str, str] | None = None
    gap: str = " "
    chat: Markup | None = None

    @property
    def answer(self) -> str:
        """The answer to judge word by word: the gold one, else the erased one (which must have become unlikely)."""
        return self.gold or self.erased or ""

    @property
    def parts(self) -> list[Piece]:
        """The context's texts in order, each with whether it is to be erased."""
        found = [(self.prefix, False), (self.span, True), (self.suffix, False)]
        for span, text in self.further:
            found += [(span, True), (text, False)]
        return found


@dataclass(frozen=True)
class Sizes:
    """The running text around a span.

    Attributes:
        least, most: tokens in all, drawn with equal chance on a logarithmic scale.
        before: share of it that may stand before the span, `(least, most)`.
    """

    least: int = 64
    most: int = 400
    before: tuple[float, float] = (0.15, 0.6)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise OptionError(f"text of {self.least} to {self.most} tokens: needs 1 <= least <= most")

    @classmethod
    def context(cls, tokens: int) -> Sizes:
        """Texts that make contexts of about `tokens` tokens, span included."""
        around = max(tokens - 64, 16)
        return cls(around, around)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens before and behind the span."""
        total = self.least * (self.most / self.least) ** rng.random()
        before = total * rng.uniform(*self.before)
        return int(before), int(total - before)


_QUESTION, _ANSWER = "\n\nQuestion: ", "\nAnswer:"


def ask(question: str, lead: str = "") -> str:
    """The form in which questions are put behind a context; `lead` begins the answer, for models that only continue."""
    return f"{_QUESTION}{question}{_ANSWER}" + (f" {lead}" if lead else "")


def asked(question: str) -> tuple[str, str]:
    """The question and the lead that `ask` framed; a text of another form is a question without a lead."""
    words, answer, lead = question.removeprefix(_QUESTION).rpartition(_ANSWER)
    return (words, lead.strip()) if answer else (question.strip(), "")


def transcript(turns: Sequence[Turn]) -> list[Piece]:
    """A conversation as plain text, a paragraph for each message, in alternating pieces."""
    lines = [((f"{turn.role.capitalize()}: ", False), *turn.pieces, ("\n", False)) for turn in turns]
    return alternating(piece for line in lines for piece in line)


def alternating(pieces: Iterable[Piece]) -> list[Piece]:
    """The same text in as few pieces as can be, the first and the last kept (and perhaps empty)."""
    found: list[Piece] = [("", False)]
    for text, erased in (*pieces, ("", False)):
        if erased == found[-1][1]:
            found[-1] = (found[-1][0] + text, erased)
        elif text or not erased:
            found.append((text, erased))
    return found


def in_fields(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Alternating pieces, at least one of them erased, as the fields of an `EraseExample`."""
    (prefix, _), (span, _), (suffix, _), *more = pieces
    further = tuple((text, behind) for (text, _), (behind, _) in zip(more[::2], more[1::2], strict=True))
    return {"prefix": prefix, "span": span, "suffix": suffix, "further": further}


class Task(ABC):
    """A maker of examples, deterministic by seed.

    Args:
        source: a file of the task's own to read examples from, for tasks that take one (`takes_source`).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for tables and `--help`."""
    takes_source: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    """Whether an eraser can be trained on its examples: those in which something is erased, not replaced."""
    series: ClassVar[str] = ""
    """Tasks of one series draw the same contexts from the same seed; empty for a task of its own."""

    def __init__(self, source: Path | None = None) -> None:
        if source is not None and not self.takes_source:
            raise OptionError(f"the task {self.name} takes no file, {source} was given")

    def examples(self, filler: Filler, sizes: Sizes, split: Split, seed: int) -> Iterator[EraseExample]:
        """Examples of a split, endless unless they come from a file; the same seed gives the same ones."""
        rng = random.Random(f"{self.series or self.name}/{split}/{seed}")
        while True:
            yield self.make(rng, filler, sizes, split)

    @abstractmethod
    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        """One example."""


def halves(items: Sequence[str]) -> Callable[[Split], Sequence[str]]:
    """Deal items to the two splits: two thirds to train on, one third to judge by, nothing to both."""
    return lambda split: [item for index, item in enumerate(items) if (index % 3 == 2) == (split == "eval")]
