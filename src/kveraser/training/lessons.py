"""Lessons: a context with several spans to erase, and everything that is asked about it.

Knows: tasks, tokenizers, token ids, random numbers. Does not know about models.

Examples of the data tasks are put one behind the other until the context has the wanted length. Their spans are then
erased one at a time, while the others stay, or all together; so one prefill serves many spans, questions and both
protocols.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from kveraser.spans import Span
from kveraser.tasks import EraseExample, Filler, Sizes, Split, Task, read_passages

Encode = Callable[[str], list[int]]
Form = Callable[[Sequence[EraseExample]], Sequence[EraseExample]]
"""Writes the examples of a lesson in another form, such as `tasks.ChatForm`."""
_CUE, _GOAL = 8, 12
_CONTINUATION = 24


Kind = Literal["query_after", "query_cached", "other", "continuation", "cue"]
"""What a probe asks: the span's own question in one of the protocols, another example's, or to go on with text."""


@dataclass(frozen=True)
class Probe:
    """Text whose next tokens matter, behind the context.

    Attributes:
        ids: what is run after the context.
        targets: ids that the last `len(targets)` of them predict.
        gold: whether the targets are a gold answer.
        cached: index of the lesson's question whose states, but for the last token's, were computed before the erase;
            `ids` then begins with that last token. None: everything is run after the erase.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    gold: bool = False
    cached: int | None = None
    kind: Kind = "query_after"


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """How texts of lessons become ids: without the tokens that a tokenizer puts around them."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def read_filler(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Filler:
    """Running text for lessons, from a source that `read_passages` takes."""
    encode = encoder(tokenizer)
    return Filler(read_passages(text), lambda part: len(encode(part)))


@dataclass(frozen=True)
class Erase:
    """Spans that are erased together, and what is judged afterwards."""

    spans: tuple[Span, ...]
    probes: tuple[Probe, ...]

    @property
    def moments(self) -> list[tuple[int | None, tuple[Probe, ...]]]:
        """The probes by the question that stands behind the context when something is erased (None: no question)."""
        found: dict[int | None, list[Probe]] = {}
        for probe in self.probes:
            found.setdefault(probe.cached, []).append(probe)
        return [(question, tuple(probes)) for question, probes in found.items()]


@dataclass(frozen=True)
class Lesson:
    """One context, what is erased from it, and what is asked after each of the erases.

    Attributes:
        ids: the whole context.
        erases: each starts from the whole context.
        questions: ids of the questions that may already stand behind the context when something is erased.
    """

    ids: tuple[int, ...]
    erases: tuple[Erase, ...]
    questions: tuple[tuple[int, ...], ...]

    @property
    def probes(self) -> list[Probe]:
        """The probes of all erases, in order."""
        return [probe for erase in self.erases for probe in erase.probes]


Weights = Mapping[Kind, float]
"""How much a target token counts, by the kind of its probe; kinds without weight are not asked."""


@dataclass(frozen=True)
class LessonPlan:
    """What lessons are made of.

    Attributes:
        tasks: makers of examples, drawn with equal chance.
        tokens: length of the context, `(least, most)`, drawn on a logarithmic scale.
        spacing: tokens of context per span, roughly; a longer context holds more spans.
        spans: at most so many spans.
        together: chance that the spans of a context are erased all at once, with one teacher for all of them.
        weights: what is asked.
        form: in which the examples are written; None for plain text.
    """

    tasks: tuple[Task, ...]
    tokens: tuple[int, int]
    spacing: int
    spans: int
    together: float
    weights: Weights
    form: Form | None = None

    def make(self, rng: random.Random, filler: Filler, encode: Encode, split: Split) -> Lesson:
        """A lesson."""
        least, most = self.tokens
        tokens = int(least * (most / least) ** rng.random())
        count = min(max(round(tokens / self.spacing), 1), self.spans)
        around = max(tokens // count - 64, 12)
        sizes = Sizes(around, around)
        examples = [rng.choice(self.tasks).make(rng, filler, sizes, split) for _ in range(count)]
        written = self.form(examples) if self.form else examples
        return join_examples(rng, written, encode, self.weights, together=rng.random() < self.together)


def join_examples(
    rng: random.Random, examples: Sequence[EraseExample], encode: Encode, weights: Weights, *, together: bool = False
) -> Lesson:
    """Put examples one behind the other. Their parts are encoded apart, so that spans begin and end with tokens.

    Args:
        together: erase the spans of all examples at once instead of those of one example at a time.
    """
    ids: list[int] = []
    spans: list[list[Span]] = []
    for index, example in enumerate(examples):
        spans.append([])
        for part, (text, erased) in enumerate(example.parts):
            new = encode(text if part or not index or example.chat else f"\n\n{text}")
            if erased:
                spans[-1].append(Span(len(ids), len(ids) + len(new)))
            ids += new
    questions = [tuple(encode(example.question)) for example in examples]
    answers = [tuple(encode(f"{example.gap}{example.answer}")) for example in examples]
    after = tuple(encode(examples[-1].continuation)[:_CONTINUATION])

    def answer(index: int, kind: Kind) -> Probe:
        question, words, gold = questions[index], answers[index], examples[index].gold is not None
        cached = kind == "query_cached"
        return Probe(
            ((question[-1],) if cached else question) + words[:-1], words, gold and kind != "other",
            index if cached else None, kind,
        )  # fmt: skip

    def probes(members: Sequence[int]) -> tuple[Probe, ...]:
        found = []
        for index in members:
            found += [answer(index, "query_after"), answer(index, "query_cached")]
            first = spans[index][0]
            cue, goal = tuple(ids[max(first.start - _CUE, 0) : first.start]), tuple(ids[first.end : first.end + _GOAL])
            if cue and len(goal) > 1:
                found.append(Probe((*encode("\n\n"), *cue, *goal[:-1]), goal, kind="cue"))
        others = [index for index in range(len(examples)) if index not in members]
        if others:
            found.append(answer(rng.choice(others), "other"))
        if len(after) > 1:
            found.append(Probe(after[:-1], after[1:], kind="continuation"))
        return tuple(probe for probe in found if weights.get(probe.kind, 0) > 0)

    groups = [range(len(examples))] if together else [[index] for index in range(len(examples))]
    erases = [Erase(tuple(span for index in group for span in spans[index]), probes(group)) for group in groups]
    return Lesson(tuple(ids), tuple(erase for erase in erases if erase.probes), tuple(questions))
