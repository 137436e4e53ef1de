"""Lessons: contexts with several spans, made of examples of the data tasks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from conftest import make_tokenizer
from kveraser.spans import Span
from kveraser.tasks import ChatForm, EraseExample, Filler, as_task, ask
from kveraser.training.lessons import LessonPlan, join_examples
from kveraser.training.rows import Segment, places_of, slot_range

ALL = {"query_after": 1.0, "query_cached": 1.0, "other": 1.0, "continuation": 1.0, "cue": 1.0}
EXAMPLES = [
    EraseExample("the code ", "is 1. ", "the car is blue ", "which code?", None, "1"),
    EraseExample("the door ", "is 2. ", "the code ", "which door?", "3", "2", " is fast", (("is 4. ", "the car "),)),
]


def encode(text):
    return make_tokenizer().encode(text, add_special_tokens=False)


def text_of(ids):
    return make_tokenizer().decode(list(ids))


def test_spans_are_where_the_texts_of_the_examples_are():
    lesson = join_examples(random.Random(0), EXAMPLES, encode, ALL)
    found = [[text_of(lesson.ids[span.slice]).split() for span in erase.spans] for erase in lesson.erases]
    wanted = [[text_of(encode(text)).split() for text in texts] for texts in (["is 1. "], ["is 2. ", "is 4. "])]
    assert found == wanted


def test_one_span_at_a_time_or_all_together():
    apart = join_examples(random.Random(0), EXAMPLES, encode, ALL)
    together = join_examples(random.Random(0), EXAMPLES, encode, ALL, together=True)
    assert [len(erase.spans) for erase in apart.erases] == [1, 2]
    assert [len(erase.spans) for erase in together.erases] == [3]
    assert apart.ids == together.ids


def test_every_span_is_asked_about_in_both_protocols_and_densely():
    lesson = join_examples(random.Random(0), EXAMPLES, encode, ALL)
    for erase in lesson.erases:
        kinds = [probe.kind for probe in erase.probes]
        assert kinds.count("query_after") == kinds.count("query_cached") == kinds.count("other") == 1
        assert "cue" in kinds
        assert "continuation" in kinds
        after, cached = (next(p for p in erase.probes if p.kind == kind) for kind in ("query_after", "query_cached"))
        assert after.targets == cached.targets
        question = lesson.questions[cached.cached]
        assert after.ids == (*question[:-1], *cached.ids)
    gold = [[probe.gold for probe in erase.probes if probe.kind == "query_after"] for erase in lesson.erases]
    assert gold == [[False], [True]]


def test_in_chat_form_the_examples_are_one_conversation_and_answers_begin_a_reply():
    framed = [
        replace(EXAMPLES[0], question=ask("which code?")),
        replace(EXAMPLES[1], question=ask("which door?", "it is")),
    ]
    chat = ChatForm(make_tokenizer())(framed)
    lesson = join_examples(random.Random(0), chat, encode, ALL)
    texts = [text for example in chat for text, _ in example.parts]
    assert make_tokenizer().decode(list(lesson.ids), skip_special_tokens=False) == "".join(texts)
    spans = [text_of(lesson.ids[span.slice]) for erase in lesson.erases for span in erase.spans]
    assert [text.split() for text in spans] == [["is", "1."], ["is", "2."], ["is", "4."]]
    targets = [probe.targets for probe in lesson.probes if probe.kind == "query_after"]
    assert targets == [tuple(encode("1")), tuple(encode(" 3"))]
    assert not any(probe.kind == "continuation" for probe in lesson.probes)


def test_a_plan_with_a_form_writes_its_examples_in_it():
    filler = Filler([f"Sentence number {n} of the car and the door. Then another one." for n in range(30)],
                    lambda text: len(encode(text)))  # fmt: skip
    plan = LessonPlan((as_task("needle"),), (256, 256), 128, 8, 0.0, ALL, ChatForm(make_tokenizer()))
    text = make_tokenizer().decode(list(plan.make(random.Random(3), filler, encode, "train").ids))
    assert text.count("<s>user") == text.count("<s>assistant") == 2
    assert text.count("<s>system") == 1


def test_terms_without_weight_are_not_asked():
    weights = {**ALL, "continuation": 0.0, "cue": 0.0, "other": 0.0}
    lesson = join_examples(random.Random(0), EXAMPLES, encode, weights)
    assert {probe.kind for probe in lesson.probes} == {"query_after", "query_cached"}


def test_lessons_are_about_as_long_as_asked_and_longer_ones_hold_more_spans():
    filler = Filler([f"Sentence number {n} of the car and the door. Then another one." for n in range(30)],
                    lambda text: len(encode(text)))  # fmt: skip
    counts = []
    for tokens in (64, 1024):
        plan = LessonPlan((as_task("needle"),), (tokens, tokens), 128, 8, 0.0, ALL)
        lesson = plan.make(random.Random(3), filler, encode, "train")
        counts.append(len(lesson.erases))
        assert 0.5 * tokens < len(lesson.ids) < 3 * tokens + 200
    assert counts == [1, 8]


def test_segments_stand_one_behind_the_other():
    nothing = slot_range(0, 0)
    row = [Segment.run([1, 2], 0, nothing), Segment([3, 4, 5], [7, 9, 20], nothing)]
    assert places_of(row) == [Span(0, 2), Span(2, 5)]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_lesson(seed):
    assert join_examples(random.Random(seed), EXAMPLES, encode, ALL) == join_examples(
        random.Random(seed), EXAMPLES, encode, ALL
    )
