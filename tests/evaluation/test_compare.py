"""All methods on one context: the same question, undone in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kveraser as kv
from conftest import make_tokenizer, random_eraser, same, states, text_model
from kveraser.evaluation import Errata, Erratum, compare_methods, read_parts
from kveraser.evaluation.erratum import DeleteAndErratum, Line, as_compared
from kveraser.methods import as_method
from kveraser.tasks import EraseExample

PARTS = [
    ("the door is blue and ", False),
    ("the code is 1234. ", True),
    ("the car is fast and ", False),
    ("it is blue. ", True),
    ("the end", False),
]


def read(question=None):
    model = text_model()
    context = kv.ErasableContext(model, make_tokenizer(), random_eraser(model, repair=2))
    spans = read_parts(context, PARTS)
    if question:
        context.append(question)
    return context, spans


def test_reading_gives_the_spans_of_what_is_to_be_erased_and_skips_empty_texts():
    context, spans = read()
    assert [context.text_of(span) for span in spans] == [text for text, erased in PARTS if erased]
    assert context.text == "".join(text for text, _ in PARTS)
    length = len(context)
    assert read_parts(context, [("", False), (" more", True)]) == (kv.Span(length, len(context)),)


@pytest.mark.parametrize("cached", [False, True])
def test_the_numbers_are_those_of_erasing_by_hand(cached):
    question = " what is the code"
    context, spans = read(question if cached else None)
    labels = ["no-erase", "full-recompute", "kveraser:repair=0", "kveraser", "local-suffix-repair:tokens=4"]
    before = states(context.cache)
    results = compare_methods(
        context, spans, None if cached else question, [as_method(label) for label in labels], erased="1234"
    )
    assert [result.method for result in results] == labels
    assert same(before, states(context.cache))

    ids = context.encode(question)
    wanted = context.encode(" 1234")

    def logits(answer):
        if cached:
            return context.logits_ids(answer[:-1], from_last=True)
        return context.logits_ids([*ids, *answer[:-1]])[len(ids) - 1 :]

    def by_hand(method, answer):
        receipt = context.erase(spans, method)
        if answer is None:
            answer = context.generate_ids([] if cached else ids, max_new_tokens=16)
        found = logits(answer).log_softmax(-1)
        leak = logits(wanted).log_softmax(-1)[torch.arange(len(wanted)), wanted].mean().item()
        context.restore(receipt)
        return answer, found, leak

    answer, teacher, floor = by_hand(kv.FullRecompute(), None)
    assert context.decode(answer).strip() == results[1].answer  # one line, for this model
    for label, result in zip(labels, results, strict=True):
        _, found, leak = by_hand(label, answer)
        assert result.kl == pytest.approx((teacher.exp() * (teacher - found)).sum(-1).mean().item(), abs=1e-5)
        assert result.agreement == pytest.approx((teacher.argmax(-1) == found.argmax(-1)).float().mean().item())
        assert result.leak_margin == pytest.approx(leak - floor, abs=1e-5)
    assert results[1].kl == 0
    assert results[1].exact
    assert results[2].tokens_recomputed == sum(map(len, spans))
    assert results[3].tokens_recomputed == sum(map(len, spans)) + 4


def test_without_an_erased_answer_there_is_no_margin():
    context, spans = read()
    (result,) = compare_methods(context, spans, " so", [kv.DeleteAndShift()])
    assert result.leak_margin is None
    assert result.agreement <= 1


def test_an_answer_ends_with_its_first_line_that_is_not_blank(monkeypatch):
    context, spans = read()
    decoded = {1: "\n", 2: "\n ", 3: "\n blue", 4: "\n blue\n", 5: "\n blue\nand"}
    monkeypatch.setattr(context, "decode", lambda ids: decoded.get(len(ids), "too long"))
    (result,) = compare_methods(context, spans, " so", [kv.FullRecompute()], min_new_tokens=16)
    assert result.answer == "blue"


def test_auto_says_what_it_used_and_each_result_is_reported_at_once():
    context, spans = read()
    seen = []
    results = compare_methods(context, spans, " so", [kv.Auto(), kv.NoErase()], repeats=2, done=seen.append)
    assert seen == results
    assert results[0].method == "auto"
    assert results[0].used in ("kveraser", "full-recompute")
    assert results[1].used == results[1].method


def test_an_erratum_reads_its_line_behind_the_context_and_leaves_no_trace():
    context, spans = read()
    before = states(context.cache)
    errata = Errata(" what was it", {"erratum": Line(" not so. what is it", " not so. what was it")})
    teacher, erratum = compare_methods(context, spans, " what is it", [kv.FullRecompute(), Erratum()], errata=errata)
    assert same(before, states(context.cache))
    ids = context.encode(errata.lines["erratum"].corrected)
    answer = context.generate_ids(ids, max_new_tokens=16)
    assert context.decode(answer).strip().split("\n")[0] == erratum.answer
    assert erratum.tokens_recomputed == len(ids) - len(context.encode(" what is it"))
    asked = context.generate_ids(context.encode(errata.lines["erratum"].recall), max_new_tokens=16)
    assert erratum.recall == context.decode(asked).strip()
    assert teacher.recall is not None


def test_an_erratum_without_a_line_is_refused():
    context, spans = read()
    with pytest.raises(kv.OptionError, match="no line says what is taken back"):
        compare_methods(context, spans, " so", [Erratum()])


def test_the_line_says_each_span_once_in_one_line_and_of_long_ones_the_beginning():
    line = Erratum().line(["The code\nis 1. ", "The code is 1.", "It is blue. " * 50])
    assert line.startswith('Erratum: "The code is 1." and "It is blue.')
    assert "..." in line
    assert "\n" not in line
    assert line.count("The code is 1.") == 1
    assert len(line) < 400


def test_an_erratum_is_known_to_tables_and_is_no_method_of_the_library():
    assert as_compared("erratum") == Erratum()
    assert as_compared("no-erase") == kv.NoErase()
    assert "erratum" not in kv.methods()
    with pytest.raises(kv.OptionError, match="no erasing method 'erratum'"):
        as_method("erratum")


def test_a_replacement_is_compared_with_recomputing_the_new_text_and_with_a_line_that_says_it():
    context, spans = read()
    before, new = states(context.cache), "the code is 99, and nobody knows why. "
    example = EraseExample("", "the code is 1234. ", "", "what is it", "99", "1234", new=new)
    methods = [kv.FullRecompute(), kv.Steering(), kv.NoErase(), Erratum(), DeleteAndErratum()]
    errata = Errata.of(example, methods, cached=False)
    assert errata.lines["delete-and-erratum"].corrected.startswith("\n\nCorrection: the code is 99")
    assert "1234" in errata.lines["erratum"].corrected
    found = compare_methods(context, spans, " what is it", methods, erased="1234", new=new, errata=errata)
    assert same(before, states(context.cache))
    by_hand = context.replace(spans, new, "full-recompute")
    assert context.generate(" what is it", max_new_tokens=16).strip().split("\n")[0] == found[0].answer
    assert by_hand.exact
    assert found[2].kl > 0
    assert found[4].tokens_recomputed == found[3].tokens_recomputed - len(
        context.encode(errata.lines["erratum"].corrected)
    ) + len(context.encode(errata.lines["delete-and-erratum"].corrected))
    with pytest.raises(kv.OptionError, match="no new text"):
        Errata.of(replace(example, new=None), methods, cached=False)


def test_a_given_token_ends_an_answer():
    context, spans = read()
    said = []
    context.reply_ids, usual = lambda *a, **o: said.append(usual(*a, **o)) or said[-1], context.reply_ids
    compare_methods(context, spans, " so", [kv.FullRecompute()])
    first = said[0][0]
    compare_methods(context, spans, " so", [kv.FullRecompute()], ends=[first])
    assert said[1] == [first]
