"""Replaced: a fact that was updated. Its sentence is to say the new value, as if it had always done so.

The value is said in one place only, so that whoever erases has no answer left, and whoever appends an erratum keeps two. Half of the new
sentences are as long as the old one (about), the others say when or why it was changed, or did so before.
"""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, halves
from kveraser.tasks.facts import make_fact, surround

_FACTS = halves(
    [
        "The {firm} parcel for {person} is now in {value}.|Where is the {firm} parcel for {person} now?|PLACES",
        "The price of the {firm} ticket to {place} is {value} dollars.|How many dollars is the price of the {firm} ticket to {place}?|NUMBERS",
        "Flight {firm} to {place} leaves from gate {value}.|From which gate does flight {firm} to {place} leave?|NUMBERS",
        "The duty officer in {place} tonight is {value}.|Who is the duty officer in {place} tonight?|PEOPLE",
        "The build of {firm} finished with code {value}.|With which code did the build of {firm} finish?|PINS",
        "The weather in {place} right now is {value}.|What is the weather in {place} right now?|WEATHER",
        "{person} has moved the {firm} review to {value}.|To which month has {person} moved the {firm} review?|MONTHS",
        "The delivery to {place} takes {value} days.|How many days does the delivery to {place} take?|NUMBERS",
        "The guest room of {person} is painted {value}.|In which color is the guest room of {person} painted?|COLORS",
        "The soup of the day at {firm} is {value}.|What is the soup of the day at {firm}?|FOODS",
        "The session token of {person} is {value}.|What is the session token of {person}?|CODES",
        "The {firm} team in {place} is led by {value}.|By whom is the {firm} team in {place} led?|PEOPLE",
        "Stock of {firm} in {place}: {value} boxes.|How many boxes does {firm} have in {place}?|NUMBERS",
        "The new job of {person} at {firm} is {value}.|What is the new job of {person} at {firm}?|JOBS",
        "The {place} ferry is delayed by {value} minutes.|By how many minutes is the {place} ferry delayed?|NUMBERS",
    ]
)
_REASONS = halves(
    [
        "This was changed last week.",
        "It was agreed on after a long talk with everybody.",
        "The list was wrong before.",
        "This holds until further notice.",
        "Somebody had mixed up two lines of the table.",
        "The old sheet must not be used any more.",
    ]
)


class Replaced(Task):
    """The span says the old value; replaced, it says the new one."""

    name = "replaced"
    summary = "a fact that was updated: the span is replaced, not erased"
    trained = False

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact = make_fact(rng, _FACTS, split)
        text = surround(rng, filler, sizes, split)
        old, new = f"{fact.wrong} ", f"{fact.right} "
        kind = rng.random()
        if kind < 0.25:
            old += f"{rng.choice(_REASONS(split))} "
        elif kind < 0.5:
            new += f"{rng.choice(_REASONS(split))} "
        return EraseExample(
            text.prefix, old, text.suffix, fact.question, fact.gold, fact.wrong_value, text.continuation, new=new
        )
