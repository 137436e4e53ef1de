"""Needle: a fact in running text that is wrong; the right one stands elsewhere, or nowhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kveraser.tasks import words
from kveraser.tasks.base import EraseExample, Sizes, Task, draw, halves
from kveraser.tasks.filler import Filler
from kveraser.tasks.splits import Split

_FACTS = halves(
    [
        "Shipping with {firm} to {place} takes {value} days.|How many days does shipping with {firm} to {place} take?|NUMBERS",
        "The {firm} office in {place} is on floor {value}.|On which floor is the {firm} office in {place}?|NUMBERS",
        "The access code of the {firm} warehouse in {place} is {value}.|What is the access code of the {firm} warehouse in {place}?|CODES",
        "The car that {person} drives in {place} is {value}.|What color is the car that {person} drives in {place}?|COLORS",
        "A ticket for the {firm} museum in {place} costs {value} dollars.|How many dollars does a ticket for the {firm} museum in {place} cost?|NUMBERS",
        "The manager of {firm} in {place} is called {value}.|What is the manager of {firm} in {place} called?|PEOPLE",
        "The next meeting of {firm} will be held in {value}.|Where will the next meeting of {firm} be held?|PLACES",
        "The {firm} bus to {place} leaves from platform {value}.|From which platform does the {firm} bus to {place} leave?|NUMBERS",
        "In {place}, {person} moved to a {value} house.|What color is the house that {person} moved to in {place}?|COLORS",
        "The phone extension of {person} at {firm} is {value}.|What is the phone extension of {person} at {firm}?|NUMBERS",
        "The {firm} ferry is named after {value}.|After whom is the {firm} ferry named?|PEOPLE",
        "The warranty of {firm} lasts {value} months.|How many months does the warranty of {firm} last?|NUMBERS",
    ]
)
_NOTES = halves(["", "Note: ", "Update: ", "According to the handbook, ", "Please remember: ", "As of today, "])


@dataclass(frozen=True)
class Fact:
    """A sentence with one of two values, and the question about it."""

    right: str
    wrong: str
    question: str
    right_value: str
    wrong_value: str


def make_fact(rng: random.Random, templates: Callable[[Split], Sequence[str]], split: Split) -> Fact:
    """Fill one template `sentence|question|values` with two different values."""
    sentence, question, kind = rng.choice(templates(split)).split("|")
    names = {
        "firm": rng.choice(words.FIRMS(split)),
        "place": rng.choice(words.PLACES(split)),
        "person": rng.choice(words.PEOPLE(split)),
    }
    pool = [value for value in getattr(words, kind)(split) if value not in names.values()]
    right, wrong = rng.sample(pool, 2)
    note = rng.choice(_NOTES(split))
    return Fact(
        note + sentence.format(**names, value=right),
        note + sentence.format(**names, value=wrong),
        question.format(**names),
        right,
        wrong,
    )


def surround(
    rng: random.Random, filler: Filler, sizes: Sizes, split: Split, span: str, right: str | None
) -> tuple[str, str, str, str]:
    """Put a span into running text, and the right sentence before it, behind it, or nowhere.

    Returns:
        prefix, span, suffix, continuation.
    """
    prefix = filler.text(rng, draw(rng, sizes.prefix), split)
    suffix = filler.text(rng, draw(rng, sizes.suffix), split)
    if right is not None:
        if rng.random() < 0.5:
            prefix = f"{prefix} {right} {filler.text(rng, 24, split)}"
        else:
            suffix = f"{filler.text(rng, 24, split)} {right} {suffix}"
    return f"{prefix} ", f"{span} ", suffix, " " + filler.text(rng, 24, split)


class Needle(Task):
    """Conflicting facts (the right one stays in the context), and absent ones (only the erased span had an answer)."""

    name: ClassVar[str] = "needle"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact = make_fact(rng, _FACTS, split)
        conflict = rng.random() < 0.7
        parts = surround(rng, filler, sizes, split, fact.wrong, fact.right if conflict else None)
        return EraseExample(
            *parts[:3], fact.question, fact.right_value if conflict else None, fact.wrong_value, parts[3]
        )
