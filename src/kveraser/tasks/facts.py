"""Facts: sentences with a value that can be right or wrong, and the place where they stand in running text.

Knows: templates `sentence|question|values`. Does not know which task uses them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kveraser.tasks import words
from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, ask, halves

NOTES = halves(
    ["", "Note: ", "", "", "Update: ", "According to the handbook, ", "Please remember: ", "", "As of today, "]
)
_SENTENCES = re.compile(r"(?<=[.!?]) (?=[A-Z])")
NEIGHBOR = 24
"""Tokens of text between the two statements of a fact, and of natural continuation."""


@dataclass(frozen=True)
class Fact:
    """A sentence with one of two values, and the question about it.

    Attributes:
        right, wrong: the sentences.
        question: framed, with the sentence's beginning as the lead of the answer.
        gold: how a right answer goes on: the value and the rest of the sentence.
        right_value, wrong_value: the values alone.
    """

    right: str
    wrong: str
    question: str
    gold: str
    right_value: str
    wrong_value: str


def draw_words(rng: random.Random, kind: str, split: Split) -> tuple[dict[str, str], list[str]]:
    """Names for a template (`firm`, `place`, `person`), and two different values, none of them a name.

    Args:
        kind: of the values, as `tasks/words.py` has them.
    """
    names = {
        "firm": rng.choice(words.FIRMS(split)),
        "place": rng.choice(words.PLACES(split)),
        "person": rng.choice(words.PEOPLE(split)),
    }
    pool = [value for value in getattr(words, kind)(split) if value not in names.values()]
    return names, rng.sample(pool, 2)


def make_fact(
    rng: random.Random,
    templates: Callable[[Split], Sequence[str]],
    split: Split,
    *,
    lead: float = 0.8,
    notes: bool = True,
) -> Fact:
    """Fill one template `sentence|question|values` with two different values.

    Args:
        lead: chance that the question comes with the beginning of the answer.
        notes: whether the sentences may have an introduction.
    """
    sentence, question, kind = rng.choice(templates(split)).split("|")
    names, (right, wrong) = draw_words(rng, kind, split)
    note = rng.choice(NOTES(split)) if notes else ""
    before, after = sentence.split("{value}")
    begin = before.format(**names).strip() if rng.random() < lead else ""
    return Fact(
        note + sentence.format(**names, value=right),
        note + sentence.format(**names, value=wrong),
        ask(question.format(**names), begin),
        (right + after.format(**names)).rstrip(".") if begin else right,
        right,
        wrong,
    )


@dataclass(frozen=True)
class Surroundings:
    """Running text around a span: `prefix`, `suffix`, and the `continuation` behind the suffix."""

    prefix: str
    suffix: str
    continuation: str


def surround(rng: random.Random, filler: Filler, sizes: Sizes, split: Split, right: str | None = None) -> Surroundings:
    """Running text for a span, with the right sentence before the span, behind it, or (None) nowhere."""
    before, behind = sizes.draw(rng)
    prefix, suffix = filler.text(rng, before, split), filler.text(rng, behind, split)
    if right is not None:
        if rng.random() < 0.5:
            prefix = f"{prefix} {right} {filler.text(rng, NEIGHBOR, split)}"
        else:
            suffix = f"{filler.text(rng, NEIGHBOR, split)} {right} {suffix}"
    return Surroundings(f"{prefix} ", suffix, " " + filler.text(rng, NEIGHBOR, split))


def stale(
    rng: random.Random,
    filler: Filler,
    split: Split,
    texts: tuple[str, str, str],
    question: str,
    wrong: str,
    right: str | None,
) -> EraseExample:
    """The example in which a wrong value is erased.

    Args:
        texts: prefix, span and suffix.
        right: the value that is said elsewhere; None where none is.
    """
    return EraseExample(*texts, question, right, wrong, " " + filler.text(rng, NEIGHBOR, split))


def scatter(rng: random.Random, text: str, sentences: Sequence[str]) -> str:
    """A text with sentences put in at random places between its own, in the order given."""
    own = _SENTENCES.split(text)
    places = sorted(rng.randint(0, len(own)) for _ in sentences)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        own.insert(place, sentence)
    return " ".join(own)
