"""Which states a request gets, by policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import TALK, ask, chat_ids, fresh, newest_context, with_placeholder, without

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model, token_ids
from kveraser.serving.service import Service, ServiceOptions


def test_a_second_turn_reuses_the_whole_first_one(make_service):
    service = make_service()
    first = ask(service, TALK[:2])
    assert (first.reuse.method, first.reuse.exact, first.reuse.tokens_reused) == ("prefill", True, 0)
    second = ask(service, TALK[:4])
    assert second.reuse.method == "prefix"
    shared = len(chat_ids(TALK[:2])) - len(make_tokenizer().encode("<s>assistant\n"))
    assert second.reuse.tokens_reused >= shared
    assert second.reuse.tokens_reused + second.reuse.tokens_recomputed == second.prompt_tokens
    assert second.text == fresh(make_service, TALK[:4]).text


@pytest.mark.parametrize("gone", [(2,), (0,), (2, 3), (1, 3)])
def test_dropping_a_message_under_exact_is_a_fresh_prefill(make_service, gone):
    service = make_service()
    ask(service, TALK)
    reply = ask(service, without(TALK, *gone), logprobs=2)
    plain = fresh(make_service, without(TALK, *gone), logprobs=2)
    assert reply.reuse.exact
    assert reply.text == plain.text
    assert [t.id for t in reply.tokens] == [t.id for t in plain.tokens]
    assert [t.logprob for t in reply.tokens] == pytest.approx([t.logprob for t in plain.tokens], abs=1e-3)


def test_dropping_a_message_under_kveraser_keeps_nearly_all_and_says_that_it_is_approximate(make_service):
    service = make_service()
    ask(service, TALK)
    shorter = without(TALK, 2)
    reply = ask(service, shorter, "kveraser")
    assert (reply.reuse.method, reply.reuse.exact, len(reply.reuse.spans)) == ("kveraser", False, 1)
    assert reply.reuse.tokens_reused >= reply.prompt_tokens - 8
    start, end = reply.reuse.spans[0]
    assert make_tokenizer().decode(chat_ids(TALK)[start:end]) == "<s>tool\nthe code is 1234 and it is fast</s>\n"
    held = newest_context(service)
    assert tuple(held.view.ids[: len(chat_ids(shorter))].tolist()) == chat_ids(shorter)
    again = ask(service, shorter, "kveraser")
    assert (again.reuse.method, again.reuse.exact) == ("prefix", False)


def test_a_request_for_exact_gets_nothing_of_what_was_steered(make_service):
    service = make_service()
    ask(service, TALK)
    ask(service, without(TALK, 2), "kveraser")
    reply = ask(service, without(TALK, 2))
    assert (reply.reuse.method, reply.reuse.exact) == ("full-recompute", True)
    assert reply.text == fresh(make_service, without(TALK, 2)).text
    back = ask(service, TALK)
    assert back.reuse.exact
    assert back.text == fresh(make_service, TALK).text


def test_a_placeholder_that_is_never_repaired_is_never_called_exact(make_service):
    service = make_service()
    ask(service, TALK)
    cleared = with_placeholder(TALK, 2)
    assert not ask(service, cleared, "kveraser").reuse.exact
    assert not ask(service, cleared, "kveraser").reuse.exact
    twice = with_placeholder(cleared, 3)
    assert not ask(service, twice, "kveraser").reuse.exact
    dropped = without(twice, 2)
    reply = ask(service, dropped, "kveraser")
    assert not reply.reuse.exact
    assert tuple(newest_context(service).view.ids[: reply.prompt_tokens].tolist()) == chat_ids(dropped)
    exact = ask(service, dropped)
    assert exact.reuse.exact
    assert exact.text == fresh(make_service, dropped).text


def test_two_conversations_with_one_beginning_do_not_take_each_others_states(make_service):
    service = make_service()
    one, two = TALK[:2], [TALK[0], ("user", "tell me of the car")]
    ask(service, one)
    second = ask(service, two)
    assert second.reuse.method == "prefix"
    assert ask(service, [*one, ("assistant", "1"), ("user", "more")]).reuse.tokens_reused >= len(chat_ids(one)) - 12
    assert second.text == fresh(make_service, two).text


def test_another_key_never_matches(make_service):
    service = make_service()
    ask(service, TALK, owner="a")
    for policy in ("exact", "kveraser", "auto"):
        assert ask(service, TALK, policy, owner=f"b{policy}").reuse.method == "prefill"


def test_a_model_without_a_trained_eraser_is_served_with_a_neutral_one():
    service = Service(text_model(), make_tokenizer(), None, ServiceOptions(cache_budget=1 << 24, policy="kveraser"))
    try:
        assert service.eraser.is_neutral
        ask(service, TALK)
        reply = ask(service, without(TALK, 2), "kveraser")
        assert reply.reuse.method == "kveraser"
        assert not reply.reuse.exact
    finally:
        service.close()


def test_a_placeholder_that_is_another_one_later_is_changed_again(make_service):
    service = make_service()
    ask(service, TALK)
    for text in ("[cleared]", "[clear", "[Old tool result content cleared]", ""):
        changed = with_placeholder(TALK, 2, text)
        reply = ask(service, changed, "kveraser")
        assert (reply.reuse.method, reply.reuse.exact) == ("kveraser", False)
        assert tuple(newest_context(service).view.ids[: reply.prompt_tokens].tolist()) == chat_ids(changed)
    exact = ask(service, changed)
    assert exact.text == fresh(make_service, changed).text


@settings(max_examples=12)
@given(st.data())
def test_whatever_clients_drop_the_exact_policy_equals_a_fresh_prefill(data):
    model, tokenizer = text_model(), make_tokenizer()
    service = Service(model, tokenizer, random_eraser(model), ServiceOptions(cache_budget=600_000))
    try:
        talk = list(TALK)
        for _ in range(data.draw(st.integers(2, 5))):
            kind = data.draw(st.sampled_from(["drop", "clear", "cut", "grow"]))
            at = data.draw(st.integers(0, len(talk) - 1))
            if kind == "drop" and len(talk) > 1:
                talk.pop(at)
            elif kind == "clear":
                talk = with_placeholder(talk, at)
            elif kind == "cut" and at:
                talk = talk[:at]
            else:
                talk.append(data.draw(st.sampled_from(TALK)))
            policy = data.draw(st.sampled_from(["exact", "kveraser", "auto"]))
            reply = ask(service, talk, policy, max_tokens=4, logprobs=0)
            assert reply.reuse.tokens_reused <= reply.prompt_tokens - 1
            if policy == "exact":
                assert reply.reuse.exact
            if reply.reuse.exact:
                context = kv.ErasableContext(model)
                logits = context.advance(chat_ids(talk))
                expected = float(logits.log_softmax(-1)[reply.tokens[0].id])
                assert reply.tokens[0].logprob == pytest.approx(expected, abs=1e-3)
    finally:
        service.close()
    assert torch.is_grad_enabled()


def test_a_form_that_is_filled_in_otherwise_is_another_conversation(make_service):
    service = make_service()
    forms = [[*TALK[:1], ("user", f"{name}: {TALK[3][1]}")] for name in ("blue", "fast", "1234")]
    for form in forms:
        ask(service, form, "kveraser")
    assert service.submit(lambda job: service.store.count).future.result(5) == (3, 0)
    again = ask(service, forms[0])
    assert (again.reuse.method, again.reuse.exact, again.reuse.tokens_recomputed) == ("prefix", True, 1)


def test_a_conversation_whose_edit_failed_halfway_does_not_say_that_less_was_left_than_was(make_service, monkeypatch):
    service = make_service(eraser=random_eraser(text_model(), repair=16))
    ask(service, TALK)
    changed = without(with_placeholder(TALK, 0), 2)

    def fail(*_, **__):
        raise kv.ContextError("no room")

    monkeypatch.setattr(kv.ErasableContext, "replace_spans", fail)
    with pytest.raises(kv.ContextError, match="no room"):
        ask(service, changed, "kveraser")
    monkeypatch.undo()
    reply = ask(service, changed, "kveraser")
    assert (reply.reuse.reason, reply.reuse.exact, reply.reuse.residual) == ("changed", False, None)


@pytest.mark.parametrize(("readers", "run"), [(70, 70), (16, 16), (None, 2 * 50)])
def test_a_change_recomputes_so_many_readers_as_the_server_was_told_or_by_the_length_of_what_was_there(
    make_service, readers, run
):
    said = " ".join(["the code of the door is 1234"] * 6)
    talk = [*TALK[:2], ("tool", said), ("assistant", " ".join(["the car is blue and it is fast"] * 40)), TALK[5]]
    service = make_service(eraser=kv.KVEraser.neutral(text_model(), ids=token_ids(300)[0]), readers=readers)
    ask(service, talk)
    reuse = ask(service, without(talk, 2), "kveraser").reuse
    (span,) = reuse.spans
    assert span[1] - span[0] == 50
    assert (reuse.method, reuse.eraser) == ("kveraser", "neutral")
    assert sum(end - start for start, end in reuse.recomputed) == run


def test_an_eraser_with_a_number_of_its_own_keeps_to_it(make_service):
    talk = [*TALK[:3], ("assistant", " ".join(["the car is blue and it is fast"] * 40)), TALK[5]]
    service = make_service(eraser=kv.KVEraser.neutral(text_model(), repair=11, ids=token_ids(300)[0]))
    ask(service, talk)
    reuse = ask(service, without(talk, 2), "kveraser").reuse
    assert sum(end - start for start, end in reuse.recomputed) == 11
