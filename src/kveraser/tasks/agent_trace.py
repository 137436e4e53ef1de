"""Agent trace: a tool loop of several turns whose early result was wrong. Later turns worked with it before it was found out.

The turns that used the result speak of it without its value, or (then they are erased together with it) say it again.
"""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, Turn, ask, halves, in_fields, transcript
from kveraser.tasks.facts import NEIGHBOR, draw_words

_CALLS = halves(
    [
        "find_gate(flight to {place})|gate {value}|At which gate is the flight to {place}?|The flight to {place} is at gate|NUMBERS",
        "read_setting({firm}, color)|the color is {value}|Which color is set for {firm}?|The color that is set for {firm} is|COLORS",
        "who_is_on_call({firm})|{value} is on call|Who is on call at {firm}?|The one on call at {firm} is|PEOPLE",
        "get_warehouse({firm})|stored in {value}|In which city are the goods of {firm} stored?|The goods of {firm} are stored in|PLACES",
        "count_errors({firm})|{value} errors|How many errors does {firm} have?|The number of errors of {firm} is|NUMBERS",
        "get_token({person})|token {value}|What is the token of {person}?|The token of {person} is|CODES",
        "forecast({place})|it will be {value}|What will the weather be in {place}?|The weather in {place} will be|WEATHER",
        "read_profile({person})|job: {value}|What is the job of {person}?|The job of {person} is|JOBS",
        "release_month({firm})|planned for {value}|In which month is the release of {firm}?|The release of {firm} is in|MONTHS",
        "find_room({person})|room {value}|In which room is {person}?|{person} is in room|PINS",
        "last_order({person})|ordered {value}|What did {person} order last?|The last order of {person} was|FOODS",
        "find_city({person})|now in {value}|In which city is {person} now?|{person} is now in|PLACES",
    ]
)  # fmt: skip
_RESULTS = halves(["Tool result: {text}", "Result: {text}", "[tool output] {text}"])
_USES = halves(
    [
        "I write that into the report: call save_report(with the result above)|saved",
        "With this I can go on: call send_summary(what was found)|sent",
        "Good, I plan with it: call make_plan(from the last result)|the plan is made",
        "I tell the team: call post_message(the result of the last call)|posted",
        "Next step, based on that: call update_table(with this value)|one row updated",
        "That answers the first part: call open_ticket(with what the tool said)|ticket opened",
    ]
)
_REPEATS = halves(
    [
        "The tool says {value}, so I go on with {value}.",
        "It is {value}, then.",
        "Noted: {value}.",
    ]
)
_DOUBTS = halves(
    [
        "The service reports that its earlier answer was wrong. I call it again: ",
        "That result came from an old copy, so once more: ",
        "There was an incident with that tool; I repeat the call: ",
    ]
)
_DONE = halves(["Thank you, I have it.", "Understood.", "Good, that is all I need."])


class AgentTrace(Task):
    """The erased span is the tool's first result (and what repeats it); a later call gave the right one, or none did."""

    name = "agent-trace"
    summary = "a tool loop of several turns that worked with a wrong result"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        call, result, question, lead, kind = rng.choice(_CALLS(split)).split("|")
        names, (right, wrong) = draw_words(rng, kind, split)
        call = f"call {call.format(**names)}"
        form, repeat = rng.choice(_RESULTS(split)), rng.random() < 0.35
        known = rng.random() < 0.7
        before, behind = sizes.draw(rng)
        uses = [entry.split("|") for entry in rng.sample(list(_USES(split)), 2)]

        def tool(text: str) -> Turn:
            return Turn("user", ((form.format(text=text), False),))

        def says(text: str) -> Turn:
            return Turn("assistant", ((text, False),))

        first = f"{rng.choice(_REPEATS(split)).format(value=wrong)} " if repeat else ""
        turns = [
            Turn("user", ((f"Work with the tools until the task is done. Notes:\n{filler.text(rng, before, split)}", False),)),
            says(call),
            Turn("user", ((form.format(text=result.format(**names, value=wrong)), True),)),
            Turn("assistant", (*([(first, True)] if first else []), (uses[0][0], False))),
            tool(uses[0][1]),
            says("call read_page(1)"),
            tool(filler.text(rng, max(behind // 2, 1), split)),
            says(uses[1][0]),
            tool(uses[1][1]),
            says("call read_page(2)"),
            tool(filler.text(rng, max(behind - behind // 2, 1), split)),
        ]  # fmt: skip
        if known:
            turns += [says(rng.choice(_DOUBTS(split)) + call), tool(result.format(**names, value=right))]
        turns.append(says(rng.choice(_DONE(split))))
        return EraseExample(
            **in_fields(transcript(turns)),
            question=ask(question.format(**names), lead.format(**names)),
            gold=right if known else None,
            erased=wrong,
            continuation=filler.text(rng, NEIGHBOR, split),
            turns=tuple(turns),
        )
