"""Tool observation: an agent's transcript in which one tool result was wrong and a later call gave the right one."""

from __future__ import annotations

import random

from kveraser.tasks import words
from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, Turn, halves
from kveraser.tasks.facts import NEIGHBOR, make_fact

_RESULTS = halves(
    [
        "weather({place}): {value}|What does the weather service say about {place}?|WEATHER",
        "stock({firm}): {value} pieces left|How many pieces does {firm} have left?|NUMBERS",
        "lookup(order of {person}): ships from {value}|Where does the order of {person} ship from?|PLACES",
        "price({firm} ticket): {value} euros|How many euros does the {firm} ticket cost?|NUMBERS",
        "seat({person}): {value}|Which seat does {person} have?|CODES",
        "owner({firm}): {value}|Who owns {firm}?|PEOPLE",
        "tracking({person}): parcel is in {value}|Where is the parcel of {person}?|PLACES",
        "battery(device of {person}): {value} percent|How many percent is the battery of {person}'s device at?|NUMBERS",
        "door_code({firm}): {value}|What is the door code of {firm}?|PINS",
        "birthday({person}): {value}|In which month is the birthday of {person}?|MONTHS",
        "menu({place} canteen): {value}|What is on the menu of the {place} canteen?|FOODS",
        "color(badge of {person}): {value}|What color is the badge of {person}?|COLORS",
    ]
)
_LEADS = halves(["Tool result: ", "Observation: ", "[tool] ", "Result of the call: ", "Function output: ", "OUTPUT > "])
_AGAIN = halves(
    [
        "Assistant: That may be out of date, I will ask again.\n",
        "Assistant: Let me check this once more.\n",
        "Assistant: The service had a fault; calling it again.\n",
    ]
)


class ToolObservation(Task):
    """The erased span is the first, wrong result; with or without a second one."""

    name = "tool-observation"
    summary = "a wrong tool result in an agent's transcript"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        fact = make_fact(rng, _RESULTS, split, notes=False)
        lead = rng.choice(_LEADS(split))
        repeated = rng.random() < 0.75
        suffix = "Assistant: Thank you, that is noted.\n"
        again: tuple[Turn, ...] = ()
        if repeated:
            doubt = rng.choice(_AGAIN(split))
            suffix = f"{doubt}{lead}{fact.right}\n"
            said = doubt.removeprefix("Assistant: ")
            again = (Turn("assistant", ((said, False),)), Turn("user", ((f"{lead}{fact.right}", False),)))
        before, behind = sizes.draw(rng)
        page, more = filler.text(rng, before, split), filler.text(rng, behind, split)
        people = words.PEOPLE(split)
        person = rng.choice(people)
        while person in (fact.right_value, fact.wrong_value):  # the user is nobody that is asked about
            person = people[(people.index(person) + 1) % len(people)]
        return EraseExample(
            prefix=f"User: I am {person}. Read this page first.\n{lead}page: {page}\nAssistant: Now I call the service.\n",
            span=f"{lead}{fact.wrong}\n",
            suffix=f"{suffix}User: Please read this page too.\n{lead}page: {more}\n",
            question=fact.question,
            gold=fact.gold if repeated else None,
            erased=fact.wrong_value,
            continuation=filler.text(rng, NEIGHBOR, split),
            turns=(
                Turn("user", ((f"I am {person}. Read this page first.\n{lead}page: {page}", False),)),
                Turn("assistant", (("Now I call the service.", False),)),
                Turn("user", ((f"{lead}{fact.wrong}", True),)),
                *again,
                Turn("assistant", (("Thank you, that is noted.", False),)),
                Turn("user", ((f"Please read this page too.\n{lead}page: {more}", False),)),
                Turn("assistant", (("I have read it.", False),)),
            ),
        )
