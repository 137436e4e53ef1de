"""Data tasks: deterministic, and nothing of training is in evaluation."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from kveraser.evaluation import exact_match, leaks
from kveraser.tasks import (
    Filler,
    Sizes,
    agent_trace,
    as_task,
    ask,
    coreference,
    derived,
    document_qa,
    facts,
    in_context,
    injection,
    many_needles,
    needle,
    preference,
    read_passages,
    replaced,
    tasks,
    tool_observation,
    tool_selection,
    variable_tracking,
    words,
)
from kveraser.tasks.base import asked


def filler():
    return Filler([f"Passage {n} is about things of {1900 + n}. It has {n} sentences of some length. They go on for a while in the town."
                   for n in range(40)], lambda text: len(text.split()))  # fmt: skip


def wordy():
    """Running text in which no value of a task can occur by chance."""
    return Filler(["The river went past the old mill. Nobody could say how long it had done so. It was quiet in the valley then."] * 9,
                  lambda text: len(text.split()))  # fmt: skip


def take(name, split, count=20, seed=0, sizes=Sizes(), text=None):  # noqa: B008
    return list(itertools.islice(as_task(name).examples(text or filler(), sizes, split, seed), count))


@pytest.mark.parametrize("name", tasks())
def test_the_same_seed_gives_the_same_examples(name):
    assert take(name, "train") == take(name, "train")
    assert take(name, "train") != take(name, "train", seed=1)


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_erased_answer_is_supported_by_the_spans_alone(name, split):
    labels = name == "in-context"  # there it is a label, right elsewhere
    for example in take(name, split, 60):
        spans = [text for text, erased in example.parts if erased]
        kept = "".join([*(text for text, erased in example.parts if not erased), example.new or ""])
        assert all(spans)
        assert spans[0] == example.span
        assert labels or all(example.erased in span for span in spans)
        assert example.question
        if example.gold is not None:
            assert example.gold != example.erased
            assert labels or example.gold.split()[0] in kept
        assert example.answer


@pytest.mark.parametrize("split", ["train", "eval"])
def test_what_is_replaced_says_the_new_value_alone_in_texts_of_any_length(split):
    longer = []
    for example in take("replaced", split, 60, text=wordy()):
        assert leaks(example.new, example.gold.split()[0])
        assert not leaks(example.new, example.erased)
        assert not leaks(example.prefix + example.suffix, example.erased)
        longer.append(len(example.new.split()) - len(example.span.split()))
    assert min(longer) < 0 < max(longer)


def test_needles_are_sometimes_said_twice_and_both_are_erased():
    counts = {sum(erased for _, erased in example.parts) for example in take("needle", "train", 60)}
    assert counts == {1, 2}


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("tokens", [128, 1024])
def test_contexts_have_about_the_length_that_was_asked_for(name, tokens):
    for example in take(name, "eval", 10, sizes=Sizes.context(tokens)):
        found = sum(len(text.split()) for text, _ in example.parts)
        assert 0.6 * tokens - 40 < found < 1.7 * tokens + 80


GENERATED = ["derived", "derived-direct", "variable-tracking", "needle-multikey", "needle-multivalue", "agent-trace"]


@settings(max_examples=40)
@given(
    name=st.sampled_from(GENERATED),
    split=st.sampled_from(["train", "eval"]),
    seed=st.integers(0, 10_000),
    tokens=st.sampled_from([100, 500, 2500]),
)
def test_whatever_the_seed_the_erased_answer_is_only_in_the_spans_and_the_gold_one_is_not_in_them(
    name, split, seed, tokens
):
    for example in take(name, split, 5, seed, Sizes.context(tokens), wordy()):
        spans = " ".join(text for text, erased in example.parts if erased)
        kept = " ".join(text for text, erased in example.parts if not erased)
        assert leaks(spans, example.erased)
        assert not leaks(kept, example.erased)
        assert not leaks(example.question, example.erased)
        for value in (example.gold or "").split(" and "):
            assert not leaks(spans, value)
            assert leaks(kept, value) == bool(value)


def test_what_follows_from_a_fact_is_said_at_one_of_three_distances_as_far_as_the_context_reaches():
    for tokens, wanted in ((100, {0}), (800, {0, 250}), (4000, {0, 250, 1500})):
        found = set()
        for example in take("derived", "eval", 60, sizes=Sizes.context(tokens)):
            conclusion = next(rule.split("|")[1] for rule in derived._RULES("eval")
                              if rule.split("|")[2].split("{")[0] in example.question)  # fmt: skip
            before = example.suffix[
                : example.suffix.index(max(conclusion.format(firm="|", place="|", person="|").split("|"), key=len))
            ]
            words_between = len(before.split())
            found.add(min(derived.DISTANCES, key=lambda distance: abs(distance - words_between)))
        assert found == wanted


def test_the_fact_and_what_follows_from_it_are_asked_for_in_the_same_contexts():
    pairs = list(zip(take("derived", "eval"), take("derived-direct", "eval"), strict=True))
    for follows, direct in pairs:
        assert follows.question != direct.question
        assert replace(follows, question="") == replace(direct, question="")


def test_chains_have_more_links_and_needles_more_company_in_longer_contexts():
    for name, sign in (("variable-tracking", " = VAR "), ("needle-multikey", " number of ")):
        short, long = (max("".join(text for text, _ in example.parts).count(sign)
                           for example in take(name, "train", 20, sizes=Sizes.context(tokens))) for tokens in (100, 1000))  # fmt: skip
        assert short < long


def test_all_numbers_of_a_key_but_the_erased_one_are_asked_for_in_the_order_of_the_text():
    for example in take("needle-multivalue", "train"):
        kept = example.prefix + example.suffix
        places = [kept.index(value) for value in example.gold.split(" and ")]
        assert len(places) in (2, 3)
        assert places == sorted(places)


def test_an_agent_works_on_with_a_wrong_result_and_what_repeats_it_is_erased_with_it():
    examples = take("agent-trace", "train", 60)
    assert {len(example.further) for example in examples} == {0, 1}
    for example in examples:
        roles = [turn.role for turn in example.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= 12
        told = "".join(text for turn in example.turns for text, _ in turn.pieces)
        assert all(text.strip() in told for text, erased in example.parts if erased)


def test_a_framed_question_can_be_taken_apart():
    assert asked(ask("Who?")) == ("Who?", "")
    assert asked(ask("Who?", "It was")) == ("Who?", "It was")
    assert asked("\n\nand the town") == ("and the town", "")


def test_in_context_demonstrations_are_mislabelled_in_the_span_and_right_behind_it():
    for example in take("in-context", "train", 30):
        form = example.question.strip().split("\n")[-1]
        assert form.endswith((":", "->", "?"))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_in_context_the_right_label_is_shown_where_it_stays_and_the_exchanged_one_in_the_span(split):
    for example in take("in-context", split, 150):
        assert leaks(example.prefix + example.suffix, example.gold)
        assert leaks(example.span, example.erased)


def test_an_agent_s_user_is_nobody_that_its_tools_are_asked_about():
    owners = [
        example for example in take("tool-observation", "eval", 200) if example.question.startswith("\n\nQuestion: Who")
    ]
    assert len(owners) > 5
    for example in owners:
        said = example.turns[0].pieces[0][0]
        assert not leaks(said, example.erased)
        assert example.gold is None or not leaks(said, example.gold)


def test_a_span_neighbor_is_cued_with_the_left_neighbor_and_goes_on_with_the_right_one():
    for example in take("span-neighbor", "train", 30):
        assert example.prefix.strip().endswith(example.question.strip())
        assert example.suffix.startswith(example.gold)
        assert example.span.startswith(example.erased)


def test_questions_may_begin_the_answer():
    assert ask("Who?") == "\n\nQuestion: Who?\nAnswer:"
    assert ask("Who?", "It was") == "\n\nQuestion: Who?\nAnswer: It was"


@pytest.mark.parametrize(
    "source",
    [
        words,
        facts,
        needle,
        tool_observation,
        preference,
        injection,
        coreference,
        tool_selection,
        document_qa,
        derived,
        variable_tracking,
        many_needles,
        agent_trace,
        replaced,
    ],
)
def test_templates_names_and_values_of_the_two_splits_are_disjoint(source):
    pools = [
        value for value in vars(source).values() if callable(value) and getattr(value, "__name__", "") == "<lambda>"
    ]
    assert pools
    for pool in pools:
        train, held_out = (set(pool(split)) - {""} for split in ("train", "eval"))
        assert train
        assert held_out
        assert not train & held_out


def test_labellings_of_the_two_splits_are_disjoint():
    forms = {split: {labelling.form for labelling in in_context._LABELLINGS[split]} for split in ("train", "eval")}
    labels = {
        split: {label for labelling in in_context._LABELLINGS[split] for label in labelling.items} for split in forms
    }
    assert not forms["train"] & forms["eval"]
    assert not labels["train"] & labels["eval"]


QUESTIONS = [
    {"question": f"Who built tower {n}?", "answer": name, "supporting_facts": [[f"Tower {n}", 0]],
     "context": [[f"Tower {n}", [f"Tower {n} was built by {name}.", " It is tall."]], ["River", ["A river flows."]],
                 ["Hill", ["A hill rises."]]]}
    for n, name in enumerate(["Anna", "Berta", "Clara"])
]  # fmt: skip


def test_questions_come_from_files_of_hotpotqa_and_of_musique(tmp_path):
    hotpot, musique = tmp_path / "hotpot.json", tmp_path / "musique.jsonl"
    hotpot.write_text(json.dumps(QUESTIONS))
    entries = [
        {"question": q["question"], "answer": q["answer"],
         "paragraphs": [{"title": t, "paragraph_text": "".join(s), "is_supporting": t.startswith("Tower")} for t, s in q["context"]]}
        for q in QUESTIONS
    ]  # fmt: skip
    entries[0]["paragraphs"][1]["paragraph_text"] += "\u2028"  # a line's end for Python, not for JSON
    musique.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n\n")
    assert document_qa.read_documents(hotpot)[1:] == document_qa.read_documents(musique)[1:]
    for file in (hotpot, musique):
        examples = take(f"document-qa={file}", "eval", 10, sizes=Sizes.context(200))
        assert len(examples) == 3
        for example, entry in zip(examples, QUESTIONS, strict=True):
            assert example.gold == entry["answer"]
            assert example.erased in example.span
            assert example.gold in example.prefix + example.suffix
            assert entry["question"] in example.question


def questions_with(tmp_path, *answers, passage="Tower {n} was built by {answer}."):
    """Examples of questions with these answers, each said in a passage."""
    file = tmp_path / "answers.json"
    entries = [
        {"question": f"Who built tower {n}?", "answer": answer, "supporting_facts": [["Tower", 0]],
         "context": [["Tower", [passage.format(n=n, answer=answer)]], ["Hill", ["A hill rises."]]]}
        for n, answer in enumerate(answers)
    ]  # fmt: skip
    file.write_text(json.dumps(entries))
    return [
        example for seed in range(5) for example in take(f"document-qa={file}", "eval", seed=seed, sizes=Sizes(20, 20))
    ]


def test_a_wrong_answer_says_something_else_than_the_right_one_of_the_same_kind_if_there_is_one(tmp_path):
    for example in questions_with(tmp_path, "no", "No", "yes", "no"):
        assert not exact_match(example.erased, example.gold)
        assert example.erased.lower() in ("yes", "no")
    for example in questions_with(tmp_path, "The Gull", "Gull", "gull.", "1911"):
        assert not exact_match(example.erased, example.gold)
    with pytest.raises(kv.OptionError, match="no answer that differs from 'The Gull'"):
        questions_with(tmp_path, "The Gull", "gull")
    with pytest.raises(kv.OptionError, match="no answer that differs from 'Anna'"):
        questions_with(tmp_path, "Anna")


def test_a_wrong_answer_is_no_part_of_the_right_one_and_does_not_contain_it(tmp_path):
    for example in questions_with(tmp_path, "New York City", "New York", "Rome"):
        assert example.gold == "Rome" or example.erased == "Rome"
    with pytest.raises(kv.OptionError, match="no answer that differs from 'York'"):
        questions_with(tmp_path, "York", "New York")


def test_a_wrong_passage_says_the_wrong_answer_in_whole_words(tmp_path):
    for example in questions_with(tmp_path, "Ann", "Bo", passage="Annabel and Bob knew {answer}, who built tower {n}."):
        assert example.span.startswith(f"Annabel and Bob knew {example.erased}, who built")
    for example in questions_with(tmp_path, "Ann", r"\1", passage="Annabel built it."):
        assert re.fullmatch(rf"Who built tower \d\? The answer is {re.escape(example.erased)}\.\n\n", example.span)


def test_a_wrong_yes_or_no_is_said_beside_the_question_not_within_a_passage(tmp_path):
    for example in questions_with(tmp_path, "yes", "no", passage="There is no tower {n} now, yes, {answer}."):
        assert re.fullmatch(rf"Who built tower \d\? The answer is {example.erased}\.\n\n", example.span)


def test_a_file_of_questions_is_never_trained_on(tmp_path):
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps(QUESTIONS))
    with pytest.raises(kv.OptionError, match="for evaluation only"):
        take(f"document-qa={file}", "train", 1)


def test_files_that_are_no_questions_are_named(tmp_path):
    for text in ("[{}]", "nothing"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(kv.OptionError, match="cannot be read as a HotpotQA"):
            as_task(f"document-qa={tmp_path / 'bad.json'}")
    for text in ("", "[]", "\n\n"):
        (tmp_path / "empty.json").write_text(text)
        with pytest.raises(kv.OptionError, match="holds no question"):
            as_task(f"document-qa={tmp_path / 'empty.json'}")
    with pytest.raises(kv.OptionError, match="cannot be read"):
        as_task(f"document-qa={tmp_path / 'none.json'}")
    with pytest.raises(kv.OptionError, match="takes no file"):
        as_task("needle=x.json")


def test_impossible_sizes_are_refused():
    with pytest.raises(kv.OptionError, match="1 <= least"):
        Sizes(20, 10)


def test_passages_of_the_two_splits_are_disjoint():
    source = filler()
    rng = random.Random(0)
    seen = {
        split: {s for _ in range(100) for s in source.text(rng, 30, split).split(". ")} for split in ("train", "eval")
    }
    passages = {split: {s for s in texts if s.startswith("Passage")} for split, texts in seen.items()}
    assert passages["train"]
    assert not passages["train"] & passages["eval"]


def test_filler_has_about_the_length_that_was_asked_for():
    source = filler()
    for tokens in (5, 50, 200):
        assert tokens <= len(source.text(random.Random(1), tokens, "train").split()) < tokens + 20


def test_text_comes_from_files_folders_or_python_itself(tmp_path):
    (tmp_path / "a.txt").write_text("One passage.\n\nAnother passage.")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "A third."}]))
    (tmp_path / "c.jsonl").write_text('{"text": "A fourth."}\n"A fifth."\n')
    assert read_passages(tmp_path / "a.txt") == ["One passage.", "Another passage."]
    assert read_passages(tmp_path) == ["One passage.", "Another passage.", "A third.", "A fourth.", "A fifth."]
    assert read_passages(tmp_path / "b.json") == ["A third."]
    assert len(read_passages()) > 500


def test_text_comes_from_hugging_face_data_sets(monkeypatch):
    import sys
    import types

    class Rows(list):
        def take(self, count):
            return self[:count]

    asked = []

    def load_dataset(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        return Rows([{"text": "One.", "body": "Two."}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_passages("hf:some/set") == ["One."]
    assert read_passages("hf:some/set:test:body") == ["Two."]
    assert read_passages("hf:some/set@raw-v1") == ["One."]
    assert read_passages("hf:some/set@raw-v1:test:body") == ["Two."]
    assert asked == [("some/set", name, split, True) for name in (None, "raw-v1") for split in ("train", "test")]
    with pytest.raises(kv.OptionError, match="cannot read hf:some/set"):
        read_passages("hf:some/set:train:nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(kv.OptionError, match="pip install datasets"):
        read_passages("hf:some/set")


def test_bad_sources_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "few.txt").write_text("One sentence that is long enough.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "number.json").write_text("[3]")
    for name, said in (("none.txt", "no text source"), ("bytes.txt", "cannot read"), ("empty.txt", "holds no text"),
                       ("number.json", "found int")):  # fmt: skip
        with pytest.raises(kv.OptionError, match=said):
            read_passages(tmp_path / name)
    with pytest.raises(kv.OptionError, match="usable passages"):
        Filler(read_passages(tmp_path / "few.txt"), len)
    with pytest.raises(kv.OptionError, match="no task 'x'"):
        as_task("x")
