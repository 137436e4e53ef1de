"""Running ahead and replying in llama.cpp, and its texts."""

from __future__ import annotations

import pytest
import torch

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from llama_cpp_helpers import QUESTION, bits, read


def test_looking_ahead_leaves_the_context_as_it_is(pair):
    context = pair.context()
    read(context)
    before = bits(context)
    context.logits_ids(QUESTION)
    context.logits_ids([], from_last=True)
    context.generate_ids(QUESTION, max_new_tokens=5)
    context.generate_ids(max_new_tokens=5)
    assert bits(context) == before


def test_the_last_token_runs_again_for_a_question_that_was_cached(pair):
    context = pair.context()
    read(context)
    row = context.logits_ids([], from_last=True)[0]
    assert context.generate_ids(max_new_tokens=1) == [int(row.argmax())]
    both = context.logits_ids([5, 6], from_last=True)
    assert torch.allclose(both[0], row, atol=1e-3)
    assert both.shape == (3, pair.model.vocabulary)


def test_sampling_is_repeatable_by_its_seed(pair):
    context = pair.context()
    read(context)
    sampled = [context.generate_ids(max_new_tokens=8, temperature=3.0, top_p=0.95, seed=n) for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_answers_stop_at_an_end_token_and_where_a_criterion_says(pair):
    context = pair.context()
    read(context)
    greedy = context.generate_ids(max_new_tokens=6)
    assert context.generate_ids(max_new_tokens=6, stopping_criteria=[lambda ids, _: ids.shape[1] >= 3]) == greedy[:2]


def test_text_goes_to_ids_and_back(pair):
    context = pair.context()
    span = context.append("the cat and the hat")
    context.append(" then came home")
    assert context.text_of(span) == "the cat and the hat"
    assert context.locate("hat").end == span.end
    context.erase(" the hat")
    assert context.text == "the cat and then came home"
    with pytest.raises(kv.SpanError, match="more than once"):
        context.erase("th")
