"""Coreference: the text behind the span keeps referring to what the span introduced."""

from __future__ import annotations

import random

from kveraser.tasks import words
from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, ask, halves
from kveraser.tasks.facts import stale

_INTRODUCTIONS = halves(
    [
        "{person}, a {job} from {place}, came to town.",
        "The new neighbor was {person}, a {job} who had lived in {place}.",
        "In the house by the lake there lived {person}, a {job} born in {place}.",
        "The story is about {person}, who had been a {job} in {place}.",
        "That winter the firm hired {person}, a {job} from {place}.",
        "The guest of honour was {person}, a {job} who came from {place}.",
    ]
)
_REFERENCES = halves(
    [
        "The newcomer soon knew everybody in the street.",
        "Nobody had expected such a person here.",
        "People often asked about that earlier life.",
        "This guest liked to talk about home.",
        "The same person later opened a shop.",
        "It was a kind soul, everyone agreed.",
        "The work of this visitor was soon known everywhere.",
        "After a year that name was in the newspaper.",
        "Such skills were rare in those days.",
    ]
)
_QUESTIONS = halves(
    [
        "What was the profession of the newcomer?|The newcomer was a|job",
        "What was the name of the newcomer?|The newcomer was called|person",
        "Where did the newcomer come from?|The newcomer came from|place",
        "Who is the text about?|The text is about|person",
        "What did this person do for a living?|This person worked as a|job",
        "Where had this person lived before?|This person had lived in|place",
    ]
)
_CORRECTIONS = halves(
    [
        "In truth it was {person}, a {job} from {place}.",
        "Later it turned out to have been {person}, a {job} from {place}.",
        "The records name {person}, a {job} from {place}.",
    ]
)


class Coreference(Task):
    """The erased span introduces a person; the suffix speaks of them, and sometimes says who it really was."""

    name = "coreference"
    summary = "what the following text keeps referring to"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        kinds = {"person": words.PEOPLE, "job": words.JOBS, "place": words.PLACES}
        wrong, right = {}, {}
        for kind, values in kinds.items():
            wrong[kind], right[kind] = rng.sample(list(values(split)), 2)
        question, lead, kind = rng.choice(_QUESTIONS(split)).split("|")
        corrected = rng.random() < 0.6
        before, behind = sizes.draw(rng)
        sentences = rng.sample(list(_REFERENCES(split)), 3)
        if corrected:
            sentences.insert(rng.randint(1, 3), rng.choice(_CORRECTIONS(split)).format(**right))
        texts = (
            f"{filler.text(rng, before, split)} ",
            f"{rng.choice(_INTRODUCTIONS(split)).format(**wrong)} ",
            f"{' '.join(sentences)} {filler.text(rng, behind, split)}",
        )
        gold = right[kind] if corrected else None
        return stale(rng, filler, split, texts, ask(question, lead), wrong[kind], gold)
