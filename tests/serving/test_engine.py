"""Which states a request gets, by policy; idle repair; budgets; keys; what survives on disk."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import TALK, ask, chat_ids, with_placeholder, without

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine, EngineOptions, Prompt
from kveraser.serving.jobs import JobCancelledError, JobTimeoutError


@pytest.fixture
def make_engine():
    """Engines that are closed at the end."""
    engines = []

    def make(**options):
        model = text_model()
        eraser = options.pop("eraser", random_eraser(model))
        options.setdefault("cache_budget", 1 << 24)
        engines.append(Engine(model, make_tokenizer(), eraser, EngineOptions(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def fresh(make_engine, messages, **sampling):
    return ask(make_engine(), messages, **sampling)


def settle(engine):
    """Wait until there is nothing left to do in idle time."""
    deadline = time.monotonic() + 20
    while engine.submit(lambda job: engine.store.to_repair()).future.result(5) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def only_context(engine):
    (held,) = engine.submit(lambda job: list(engine.store._held.values())).future.result(5)
    return held


def test_a_second_turn_reuses_the_whole_first_one(make_engine):
    engine = make_engine()
    first = ask(engine, TALK[:2])
    assert (first.reuse.method, first.reuse.exact, first.reuse.tokens_reused) == ("prefill", True, 0)
    second = ask(engine, TALK[:4])
    assert second.reuse.method == "prefix"
    shared = len(chat_ids(TALK[:2])) - len(make_tokenizer().encode("<s>assistant\n"))
    assert second.reuse.tokens_reused >= shared
    assert second.reuse.tokens_reused + second.reuse.tokens_recomputed == second.prompt_tokens
    assert second.text == fresh(make_engine, TALK[:4]).text


@pytest.mark.parametrize("gone", [(2,), (0,), (2, 3), (1, 3)])
def test_dropping_a_message_under_exact_is_a_fresh_prefill(make_engine, gone):
    engine = make_engine()
    ask(engine, TALK)
    reply = ask(engine, without(TALK, *gone), logprobs=2)
    plain = fresh(make_engine, without(TALK, *gone), logprobs=2)
    assert reply.reuse.exact
    assert reply.text == plain.text
    assert [t.id for t in reply.tokens] == [t.id for t in plain.tokens]
    assert [t.logprob for t in reply.tokens] == pytest.approx([t.logprob for t in plain.tokens], abs=1e-3)


def test_dropping_a_message_under_kveraser_keeps_nearly_all_and_says_that_it_is_approximate(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    shorter = without(TALK, 2)
    reply = ask(engine, shorter, "kveraser")
    assert (reply.reuse.method, reply.reuse.exact, len(reply.reuse.spans)) == ("kveraser", False, 1)
    assert reply.reuse.tokens_reused >= reply.prompt_tokens - 8
    start, end = reply.reuse.spans[0]
    assert make_tokenizer().decode(chat_ids(TALK)[start:end]) == "<s>tool\nthe code is 1234 and it is fast</s>\n"
    held = only_context(engine)
    assert tuple(held.view(())[0][: len(chat_ids(shorter))].tolist()) == chat_ids(shorter)
    again = ask(engine, shorter, "kveraser")
    assert (again.reuse.method, again.reuse.exact) == ("prefix", False)


def test_a_request_for_exact_gets_nothing_of_what_was_steered(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    ask(engine, without(TALK, 2), "kveraser")
    reply = ask(engine, without(TALK, 2))
    assert (reply.reuse.method, reply.reuse.exact) == ("full-recompute", True)
    assert reply.text == fresh(make_engine, without(TALK, 2)).text
    back = ask(engine, TALK)
    assert back.reuse.exact
    assert back.text == fresh(make_engine, TALK).text


def test_auto_steers_at_once_and_the_next_turn_is_exact(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    first = ask(engine, without(TALK, 2), "auto")
    assert (first.reuse.method, first.reuse.exact) == ("kveraser", False)
    settle(engine)
    later = [*without(TALK, 2), ("assistant", "blue"), ("user", "and the door?")]
    second = ask(engine, later, "auto")
    assert (second.reuse.method, second.reuse.exact) == ("prefix", True)
    assert second.text == fresh(make_engine, later).text


def test_a_placeholder_is_steered_over_and_rebuilt_exactly_when_idle(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    cleared = with_placeholder(TALK, 2)
    first = ask(engine, cleared, "auto")
    assert (first.reuse.method, first.reuse.exact) == ("kveraser", False)
    assert first.reuse.tokens_reused > first.prompt_tokens - 25
    settle(engine)
    held = only_context(engine)
    assert held.exact
    later = [*cleared, ("assistant", "blue"), ("user", "and the door?")]
    second = ask(engine, later, "auto")
    assert (second.reuse.method, second.reuse.exact) == ("prefix", True)
    assert second.text == fresh(make_engine, later).text


def test_a_placeholder_that_is_never_repaired_is_never_called_exact(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    cleared = with_placeholder(TALK, 2)
    assert not ask(engine, cleared, "kveraser").reuse.exact
    assert not ask(engine, cleared, "kveraser").reuse.exact
    twice = with_placeholder(cleared, 3)
    assert not ask(engine, twice, "kveraser").reuse.exact
    dropped = without(twice, 2)
    reply = ask(engine, dropped, "kveraser")
    assert not reply.reuse.exact
    assert tuple(only_context(engine).view(engine._placeholder)[0][: reply.prompt_tokens].tolist()) == chat_ids(dropped)
    exact = ask(engine, dropped)
    assert exact.reuse.exact
    assert exact.text == fresh(make_engine, dropped).text


def test_two_conversations_with_one_beginning_do_not_take_each_others_states(make_engine):
    engine = make_engine()
    one, two = TALK[:2], [TALK[0], ("user", "tell me of the car")]
    ask(engine, one)
    second = ask(engine, two)
    assert second.reuse.method == "prefix"
    assert ask(engine, [*one, ("assistant", "1"), ("user", "more")]).reuse.tokens_reused >= len(chat_ids(one)) - 12
    assert second.text == fresh(make_engine, two).text


def test_another_key_never_matches(make_engine):
    engine = make_engine()
    ask(engine, TALK, owner="a")
    for policy in ("exact", "kveraser", "auto"):
        assert ask(engine, TALK, policy, owner=f"b{policy}").reuse.method == "prefill"


def test_a_model_without_a_trained_eraser_is_served_with_a_neutral_one():
    engine = Engine(text_model(), make_tokenizer(), None, EngineOptions(cache_budget=1 << 24, policy="kveraser"))
    try:
        assert engine.eraser.is_neutral
        ask(engine, TALK)
        reply = ask(engine, without(TALK, 2), "kveraser")
        assert reply.reuse.method == "kveraser"
        assert not reply.reuse.exact
    finally:
        engine.close()


def test_memory_stays_within_the_budget_and_spilled_conversations_come_back(make_engine):
    engine = make_engine(cache_budget=200_000)
    talks = [[("user", f"{number} {TALK[4][1]}")] for number in range(12)]
    for talk in talks:
        ask(engine, talk)
        assert engine.store.bytes <= 200_000
    assert engine.store.count[1] > 0
    for talk in talks:
        reply = ask(engine, talk)
        assert reply.reuse.tokens_reused == reply.prompt_tokens - 1
        assert engine.store.bytes <= 200_000
    too_long = [("user", TALK[4][1] * 30)]
    with pytest.raises(kv.ContextError, match="cache budget"):
        ask(engine, too_long)


def test_conversations_survive_a_restart_also_steered_ones(make_engine, tmp_path):
    engine = make_engine(state_dir=tmp_path / "s")
    ask(engine, TALK)
    before = ask(engine, with_placeholder(TALK, 2), "kveraser")
    with pytest.raises(kv.SessionFileError, match="in use"):
        Engine(text_model(), make_tokenizer(), None, EngineOptions(state_dir=tmp_path / "s"))
    engine.close()
    (tmp_path / "s" / "contexts" / "half-written").mkdir()
    engine = make_engine(state_dir=tmp_path / "s")
    assert not (tmp_path / "s" / "contexts" / "half-written").exists()
    after = ask(engine, with_placeholder(TALK, 2), "kveraser")
    assert (after.reuse.method, after.reuse.exact, after.text) == ("prefix", False, before.text)
    assert after.reuse.tokens_reused == after.prompt_tokens - 1


def test_a_damaged_conversation_on_disk_is_dropped_and_read_again(make_engine, tmp_path):
    engine = make_engine(state_dir=tmp_path / "s")
    text = ask(engine, TALK).text
    engine.close()
    for file in (tmp_path / "s" / "contexts").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    engine = make_engine(state_dir=tmp_path / "s")
    reply = ask(engine, TALK)
    assert (reply.reuse.method, reply.text) == ("prefill", text)


def test_a_cancelled_request_leaves_a_context_that_goes_on(make_engine):
    engine = make_engine()
    prompt = Prompt("", chat_ids(TALK), "exact", Sampling(max_tokens=200))

    def leave(piece, reply, job):
        if reply.completion_tokens == 3:
            job.cancel()

    job = engine.submit(lambda job: engine.complete(prompt, job, lambda piece, reply: leave(piece, reply, job)))
    with pytest.raises(JobCancelledError):
        job.future.result(20)
    reply = ask(engine, TALK)
    assert reply.reuse.tokens_reused == reply.prompt_tokens - 1
    assert reply.text == fresh(make_engine, TALK).text


def test_a_request_that_takes_too_long_is_ended(make_engine):
    engine = make_engine(timeout=0.05)
    with pytest.raises(JobTimeoutError):
        ask(engine, TALK, max_tokens=3000)


@settings(max_examples=12)
@given(st.data())
def test_whatever_clients_drop_the_exact_policy_equals_a_fresh_prefill(data):
    model, tokenizer = text_model(), make_tokenizer()
    engine = Engine(model, tokenizer, random_eraser(model), EngineOptions(cache_budget=600_000))
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
            reply = ask(engine, talk, policy, max_tokens=4, logprobs=0)
            assert reply.reuse.tokens_reused <= reply.prompt_tokens - 1
            if policy == "exact":
                assert reply.reuse.exact
            if reply.reuse.exact:
                context = kv.ErasableContext(model)
                logits = context.advance(chat_ids(talk))
                expected = float(logits.log_softmax(-1)[reply.tokens[0].id])
                assert reply.tokens[0].logprob == pytest.approx(expected, abs=1e-3)
    finally:
        engine.close()
    assert torch.is_grad_enabled()


def test_a_full_disk_costs_a_cached_conversation_and_nothing_else(make_engine, monkeypatch):
    engine = make_engine(cache_budget=200_000)
    ask(engine, [("user", TALK[4][1])])

    def full(*_):
        raise OSError(28, "No space left on device")

    import kveraser.files

    monkeypatch.setattr(kveraser.files.os, "fsync", full)
    for number in range(4):
        ask(engine, [("user", f"{number} {TALK[4][1]}")])
    assert engine.store.bytes <= 200_000
    assert engine.store.count[1] == 0


def test_a_repair_that_fails_leaves_the_conversation_approximate_and_the_server_alive(make_engine, monkeypatch):
    engine = make_engine()
    ask(engine, TALK)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kv.ErasableContext, "repair", fail)
    ask(engine, without(TALK, 2), "auto")
    settle(engine)
    assert not ask(engine, without(TALK, 2), "auto").reuse.exact


def test_a_placeholder_of_which_a_part_is_dropped_is_read_again(make_engine):
    engine = make_engine()
    ask(engine, TALK)
    cleared = with_placeholder(TALK, 2)
    ask(engine, cleared, "kveraser")
    changed = with_placeholder(TALK, 2, "[clear")
    reply = ask(engine, changed, "kveraser")
    assert reply.reuse.exact
    assert reply.text == fresh(make_engine, changed).text
