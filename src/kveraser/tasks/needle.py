"""Needle: a fact in running text that is wrong; the right one stands elsewhere, or nowhere."""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, halves
from kveraser.tasks.facts import make_fact, surround

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
        "The code of the {firm} safe is {value}.|What is the code of the {firm} safe?|PINS",
        "The door code is {value}.|What is the door code?|PINS",
        "The pin of {person} is {value}.|What is the pin of {person}?|PINS",
        "The password is {value}.|What is the password?|CODES",
        "The {firm} concert takes place in {value}.|In which month does the {firm} concert take place?|MONTHS",
        "{person} lives in {value}.|Where does {person} live?|PLACES",
        "The deadline of the {firm} project is the {value}th week.|In which week is the deadline of the {firm} project?|NUMBERS",
        "The number of rooms in the {place} hotel is {value}.|How many rooms are in the {place} hotel?|NUMBERS",
        "The lead engineer of {firm} is {value}.|Who is the lead engineer of {firm}?|PEOPLE",
        "The flag of the {place} club is {value}.|What color is the flag of the {place} club?|COLORS",
        "{person} works as a {value}.|What does {person} work as?|JOBS",
        "The parcel for {person} weighs {value} kilograms.|How many kilograms does the parcel for {person} weigh?|NUMBERS",
    ]
)


class Needle(Task):
    """Conflicting facts (the right one stays in the context), and absent ones (only the erased span had an answer).

    One time in four the wrong fact was said twice, and both places are erased.
    """

    name = "needle"
    summary = "a stale fact in running text, said once or twice"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact = make_fact(rng, _FACTS, split)
        conflict = rng.random() < 0.7
        text = surround(rng, filler, sizes, split, fact.right if conflict else None)
        suffix = text.suffix
        further: tuple[tuple[str, str], ...] = ()
        if rng.random() < 0.25:
            sentences = suffix.split(". ")
            middle = len(sentences) // 2
            if middle:
                suffix = ". ".join(sentences[:middle]) + ". "
                further = ((f"{fact.wrong} ", ". ".join(sentences[middle:])),)
        return EraseExample(
            text.prefix, f"{fact.wrong} ", suffix, fact.question, fact.gold if conflict else None, fact.wrong_value,
            text.continuation, further,
        )  # fmt: skip
