"""Preference: a user's preference that was taken back, or replaced by another one."""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, halves
from kveraser.tasks.facts import make_fact, surround

_PREFERENCES = halves(
    [
        "{person}'s favourite food is {value}.|What is {person}'s favourite food?|FOODS",
        "{person} always wants to drink {value}.|What does {person} want to drink?|DRINKS",
        "{person}'s favourite color is {value}.|What is {person}'s favourite color?|COLORS",
        "{person} would like to spend the holidays in {value}.|Where would {person} like to spend the holidays?|PLACES",
        "{person} prefers to have {value} for dinner.|What does {person} prefer to have for dinner?|FOODS",
        "{person} wants to be called {value}.|What does {person} want to be called?|PEOPLE",
        "{person} asked for a room that is painted {value}.|In which color should {person}'s room be painted?|COLORS",
        "For breakfast {person} likes {value} best.|What does {person} like best for breakfast?|DRINKS",
        "{person} wishes to work in {value}.|Where does {person} wish to work?|PLACES",
        "{person} likes to travel in {value}.|In which month does {person} like to travel?|MONTHS",
        "The hotel should call {person} {value}.|What should the hotel call {person}?|PEOPLE",
        "{person} wants the walls to be {value}.|What color does {person} want the walls to be?|COLORS",
        "As a present {person} would like {value}.|What would {person} like as a present?|FOODS",
        "{person} wants to sit in row {value}.|In which row does {person} want to sit?|NUMBERS",
        "{person} wants the newsletter from {value}.|From where does {person} want the newsletter?|PLACES",
    ]
)


class Preference(Task):
    """The erased span is the old preference; a new one stands elsewhere, or none."""

    name = "preference"
    summary = "a user's preference that was taken back"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact = make_fact(rng, _PREFERENCES, split)
        replaced = rng.random() < 0.7
        text = surround(rng, filler, sizes, split, fact.right if replaced else None)
        return EraseExample(
            text.prefix, f"{fact.wrong} ", text.suffix, fact.question, fact.gold if replaced else None,
            fact.wrong_value, text.continuation,
        )  # fmt: skip
