"""Derived: a fact, and something that follows from it, said right behind it or far behind it; the fact is erased.

The conclusion is said without its value ("the badge has the color of the team"), so that the value is in what the model made of
that sentence when it read it, and in no text but the span's. Two tasks on the very same contexts: `derived` asks for what follows,
`derived-direct` for the fact itself (a pair as of arXiv 2609.17983; how it is made is our choice).
"""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, ask, halves
from kveraser.tasks.facts import NEIGHBOR, NOTES, draw_words, stale

_RULES = halves(
    [
        "The team color of {person} is {value}.|The badge of {person} always has the color of the team.|What color is the badge of {person}?|The color of the badge is|What is the team color of {person}?|The team color is|COLORS",
        "The order of {person} ships from {value}.|The return parcel of {person} goes back to where the order was shipped from.|To which place does the return parcel of {person} go?|The name of that place is|Where does the order of {person} ship from?|The order ships from|PLACES",
        "The {firm} launch was moved to {value}.|The {firm} party is held in the same month as the launch.|In which month is the {firm} party held?|The month of the party is|In which month is the {firm} launch?|The launch is in|MONTHS",
        "The head of the {place} office is {value}.|Whoever is the head of the {place} office also signs the contracts there.|Who signs the contracts in {place}?|The name of that person is|Who is the head of the {place} office?|The head of the office is|PEOPLE",
        "The {firm} safe opens with {value}.|The back door of {firm} opens with the same number as the safe.|Which number opens the back door of {firm}?|The number of the back door is|Which number opens the {firm} safe?|The safe opens with|PINS",
        "In the canteen of {firm} the dish of the day is {value}.|{person} eats the dish of the day in the canteen of {firm}.|What does {person} eat at {firm}?|The name of that food is|What is the dish of the day at {firm}?|The dish of the day is|FOODS",
        "{person} was trained as a {value}.|{person} now teaches young people that very trade.|Which trade does {person} teach?|The name of that trade is|What was {person} trained as?|{person} was trained as a|JOBS",
        "Gate {value} is the gate of the flight to {place}.|{person} is waiting at the gate of the flight to {place}.|At which gate is {person} waiting?|The number of that gate is|Which gate is the gate of the flight to {place}?|It is gate|NUMBERS",
        "The headquarters of {firm} are in {value}.|{person} works at the headquarters of {firm}.|In which city does {person} work?|The name of that city is|Where are the headquarters of {firm}?|The headquarters are in|PLACES",
        "The locker code of {person} is {value}.|The bicycle lock of {person} has the same code as the locker.|What is the code of {person}'s bicycle lock?|The code of the bicycle lock is|What is the locker code of {person}?|The locker code is|CODES",
        "The host of the {place} dinner serves {value}.|The guests of the {place} dinner only drink what the host serves.|What do the guests of the {place} dinner drink?|The name of that drink is|What does the host of the {place} dinner serve?|The host serves|DRINKS",
        "The mentor of {person} is {value}.|The report of {person} has to be read by the mentor first.|Who has to read the report of {person} first?|The name of that person is|Who is the mentor of {person}?|The mentor is|PEOPLE",
    ]
)  # fmt: skip
DISTANCES = (0, 250, 1500)
"""Tokens between the fact and what follows from it; those that the context has room for are drawn with equal chance."""


class Derived(Task):
    """The erased span is a wrong fact; the right one stands elsewhere, or nowhere. Asks for what follows from it."""

    name = "derived"
    summary = "what follows from a stale fact, said 0, 250 or 1,500 tokens behind it"
    series = "derived"
    direct = False
    """Whether the question is about the fact itself."""

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact, conclusion, *questions, kind = rng.choice(_RULES(split)).split("|")
        names, (right, wrong) = draw_words(rng, kind, split)
        note = rng.choice(NOTES(split))
        before, behind = sizes.draw(rng)
        distance = rng.choice([tokens for tokens in DISTANCES if tokens <= behind])
        prefix = filler.text(rng, before, split)
        between = [filler.text(rng, distance, split)] if distance else []
        rest = [filler.text(rng, behind - distance, split)]
        known = rng.random() < 0.7
        if known:
            said = note + fact.format(**names, value=right)
            if rng.random() < 0.5:
                prefix = f"{prefix} {said} {filler.text(rng, NEIGHBOR, split)}"
            else:
                rest = [filler.text(rng, NEIGHBOR, split), said, *rest]
        question, lead = questions[2:] if self.direct else questions[:2]
        span, suffix = note + fact.format(**names, value=wrong), " ".join([*between, conclusion.format(**names), *rest])
        asking = ask(question.format(**names), lead.format(**names))
        return stale(rng, filler, split, (f"{prefix} ", f"{span} ", suffix), asking, wrong, right if known else None)


class DerivedDirect(Derived):
    """The mate of `derived`: the same contexts, asked for the fact itself."""

    name = "derived-direct"
    summary = "the stale fact itself, in the contexts of `derived`"
    direct = True
