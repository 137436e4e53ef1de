"""Several replies made at the same time: as those made one after the other, and each by itself in what goes wrong."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from serving_helpers import TALK, ask, chat_ids, services, settle, with_placeholder, without

import kveraser as kv
from conftest import relative, states
from kveraser.errors import JobCancelledError, UnsupportedCacheError
from kveraser.serving import decoding, together
from kveraser.serving.completion import Prompt
from kveraser.serving.decoding import Sampling
from kveraser.serving.sessions.sessions import Sessions

SAID = ("the car is blue", "what is the code of the door?", "and the color of it? all of it is fast", "1234")


@contextmanager
def held_up(service):
    """What is sent in the block waits until its end."""
    gate = threading.Event()
    service.submit(lambda job: gate.wait(10))
    try:
        yield
    finally:
        gate.set()


def send(service, messages, policy="exact", owner="", watch=None, **sampling):
    """Send a conversation; the job."""
    sampling.setdefault("max_tokens", 12)
    prompt = Prompt(owner, chat_ids(messages), policy, Sampling(**sampling))
    found = []

    def emit(delta, reply):
        return watch is not None and bool(watch(reply, found[0]))

    with threading.Lock():
        found.append(service.submit(lambda job: service.complete(prompt, job, emit)))
    return found[0]


def talks():
    return [[*TALK[:number], ("user", said)] for number, said in enumerate(SAID, 1)]


@lru_cache
def _alone(talk, sampling):
    with services() as make:
        return ask(make(), talk, **dict(sampling))


def alone(talk, **sampling):
    """The reply of a service that makes nothing else."""
    sampling.setdefault("max_tokens", 12)
    return _alone(tuple(talk), tuple(sorted(sampling.items())))


@pytest.fixture
def together_sizes(monkeypatch):
    """How many tokens were run in each forward of several."""
    sizes, real = [], together.advance_together

    def counted(contexts, tokens):
        sizes.append(len(tokens))
        return real(contexts, tokens)

    monkeypatch.setattr(together, "advance_together", counted)
    return sizes


DRAWN = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "seed": 4, "max_tokens": 20},
    {"temperature": 1.5, "top_k": 5, "seed": 5, "max_tokens": 3},
]


def test_replies_made_together_are_those_made_one_after_the_other(make_service, together_sizes):
    serial = [alone(talk, **how) for talk, how in zip(talks(), DRAWN, strict=True)]
    service = make_service()
    with held_up(service):
        jobs = [send(service, talk, owner=f"{n}", **DRAWN[n]) for n, talk in enumerate(talks())]
    replies = [job.future.result(20) for job in jobs]
    assert max(together_sizes) == len(jobs)
    for reply, expected in zip(replies, serial, strict=True):
        assert (reply.text, reply.finish_reason) == (expected.text, expected.finish_reason)
        assert reply.completion_tokens == expected.completion_tokens
        assert reply.reuse.exact
    for number, (talk, expected) in enumerate(zip(talks(), serial, strict=True)):  # and what they left is a right cache
        again = ask(service, talk, owner=f"{number}", **{"max_tokens": 12, **DRAWN[number]})
        assert again.text == expected.text
        assert again.reuse.tokens_reused == again.prompt_tokens - 1


def test_a_batch_of_one_makes_them_one_after_the_other(make_service, together_sizes):
    service = make_service(batch=1)
    with held_up(service):
        jobs = [send(service, talk) for talk in talks()]
    assert [job.future.result(20).text for job in jobs] == [alone(t).text for t in talks()]
    assert together_sizes == []


def test_steered_conversations_go_on_together_as_alone(make_service, together_sizes):
    def edited(batch):
        service = make_service(batch=batch)
        for owner in ("a", "b"):
            ask(service, TALK, "kveraser", owner=owner)
        shorter = [without(TALK, 2), with_placeholder(TALK, 2)]
        with held_up(service):
            jobs = [send(service, t, "kveraser", owner=o) for t, o in zip(shorter, ("a", "b"), strict=True)]
            jobs.append(send(service, TALK[:3], owner="c"))
        return [job.future.result(20) for job in jobs]

    both = [edited(1), edited(8)]
    assert max(together_sizes) == 3
    for serial, batched in zip(*both, strict=True):
        assert serial.text == batched.text
        assert [serial.reuse.method, serial.reuse.exact, serial.reuse.spans] == [
            batched.reuse.method, batched.reuse.exact, batched.reuse.spans,
        ]  # fmt: skip
    assert [reply.reuse.method for reply in both[1]] == ["kveraser", "kveraser", "prefill"]


def test_one_that_is_cancelled_leaves_the_others_and_its_own_context_goes_on(make_service):
    service = make_service()

    def leave(reply, job):
        if reply.completion_tokens == 3:
            job.cancel()

    with held_up(service):
        gone = send(service, talks()[0], owner="gone", watch=leave, max_tokens=200)
        stays = send(service, talks()[1], owner="stays")
    assert stays.future.result(20).text == alone(talks()[1]).text
    with pytest.raises(JobCancelledError):
        gone.future.result(20)
    again = ask(service, talks()[0], owner="gone")
    assert again.reuse.tokens_reused == again.prompt_tokens - 1
    assert again.text == alone(talks()[0], max_tokens=8).text


def test_an_error_of_one_does_not_end_the_others(make_service, monkeypatch):
    service = make_service()
    real = kv.ErasableContext.advance
    broken = []

    def advance(self, ids):
        if self in broken and len(ids) == 1:
            raise MemoryError("of one")
        return real(self, ids)

    def no_more(contexts, tokens):
        raise MemoryError("of all")

    def break_it(reply, job):
        broken.extend(held.context for held in service.store._held.values() if held.owner == "bad")

    monkeypatch.setattr(kv.ErasableContext, "advance", advance)
    monkeypatch.setattr(together, "advance_together", no_more)
    with held_up(service):
        bad = send(service, talks()[0], owner="bad", watch=break_it)
        good = send(service, talks()[1], owner="good")
    with pytest.raises(MemoryError):
        bad.future.result(20)
    assert good.future.result(20).text == alone(talks()[1]).text


def test_a_model_that_cannot_run_them_together_runs_them_one_by_one_and_is_asked_once(make_service, monkeypatch):
    service, asked = make_service(), []

    def refuse(contexts, tokens):
        asked.append(len(tokens))
        raise UnsupportedCacheError("not this one")

    monkeypatch.setattr(together, "advance_together", refuse)
    with held_up(service):
        jobs = [send(service, talk) for talk in talks()]
    assert [job.future.result(20).text for job in jobs] == [alone(t).text for t in talks()]
    assert len(asked) == 1


def test_while_replies_are_made_sessions_are_changed_and_prompts_are_read(make_service):
    service, order = make_service(), []

    def note(name):
        return lambda reply, job: order.append((name, reply.completion_tokens)) and False

    sessions = Sessions(service.store, service.limits)

    def change(job):
        held = sessions.create("me")
        span = sessions.append_text("me", held.id, "the code is 1234, ")
        sessions.append_text("me", held.id, "the car is blue")
        order.append(("session", 0))
        held.context.erase(span)
        return held.context.text

    long = [("user", "the color of the car is blue. " * 200)]
    with held_up(service):
        first = send(service, talks()[0], owner="a", watch=note("first"), max_tokens=40)
        second = send(service, long, owner="b", watch=note("second"), max_tokens=2)
        changed = service.submit(change)
    assert changed.future.result(20) == "the car is blue"
    first.future.result(20)
    second.future.result(20)
    at = {name: order.index((name, count)) for name, count in (("session", 0), ("second", 1), ("first", 40))}
    assert 0 < at["session"] < at["first"]
    assert at["second"] < at["first"]
    assert sum(name == "first" for name, _ in order[: at["second"]]) >= 2  # a chunk is read, a token is made


def test_a_conversation_in_which_a_reply_is_made_is_copied_from_and_never_edited(make_service):
    service = make_service()
    with held_up(service):
        jobs = [send(service, TALK, "kveraser", max_tokens=20), send(service, without(TALK, 2), "kveraser")]
        jobs.append(send(service, TALK, "kveraser"))
    replies = [job.future.result(20) for job in jobs]
    assert [reply.reuse.method for reply in replies] == ["prefill", "kveraser", "prefix"]  # steered in a copy
    assert [reply.reuse.exact for reply in replies] == [True, False, True]
    assert replies[0].text == alone(TALK, max_tokens=20).text
    assert replies[2].text == alone(TALK).text
    assert not any(held.busy for held in service.submit(lambda job: service.store.conversations("")).future.result(5))


def test_replies_wait_for_memory_that_others_take_and_none_of_these_is_moved_to_disk(make_service):
    budget = int(1.6 * make_service().limits.bytes_for(len(chat_ids(TALK)) + 20))
    service = make_service(cache_budget=budget)
    most = []

    def look(reply, job):
        most.append(service.store.bytes)
        assert sum(held.busy for held in service.store._held.values()) == 1

    with held_up(service):
        jobs = [send(service, TALK, owner=f"{n}", watch=look, max_tokens=20) for n in range(3)]
    texts = [job.future.result(20).text for job in jobs]
    assert texts == [alone(TALK, max_tokens=20).text] * 3
    assert max(most) <= budget


def test_a_text_that_must_be_forgotten_is_so_once_no_reply_is_made_that_may_say_it(make_service):
    service = make_service()
    with held_up(service):
        first = send(service, TALK, max_tokens=20)
        prompt = Prompt("", chat_ids(TALK[:2]), "exact", Sampling(max_tokens=4), must_forget=("1234",))
        second = service.submit(lambda job: service.complete(prompt, job))
    assert second.future.result(20).reuse.forgotten == 1
    assert first.future.done()
    said = [held.context.text for held in service.submit(lambda job: service.store.conversations("")).future.result(5)]
    assert not any("1234" in text for text in said)


def test_while_a_text_is_still_to_be_forgotten_the_replies_of_others_are_made(make_service, monkeypatch):
    service, begun, done, real = make_service(), threading.Event(), threading.Event(), decoding.Decoder.__init__
    monkeypatch.setattr(decoding.Decoder, "__init__", lambda self, ends, *rest: real(self, lambda token: False, *rest))

    def start(said, owner, watch=None, **options):
        prompt = Prompt(
            owner, chat_ids([("user", said)]), "exact", Sampling(max_tokens=options.pop("tokens", 2)), **options
        )
        return service.submit(lambda job: service.complete(prompt, job, watch), owner)

    long = start("the code is 1234", "a", lambda delta, reply: begun.set() or done.is_set(), tokens=2000)
    assert begun.wait(20)
    forgets, later = start("hello", "a", must_forget=("1234",)), start("the code is 1234", "a")
    for other in [start(said, owner) for said in SAID for owner in ("b", "c")]:
        other.future.result(20)
    assert not any(job.future.done() for job in (long, forgets, later))
    done.set()
    assert forgets.future.result(20).reuse.forgotten == 1
    assert later.future.result(20).reuse.tokens_recomputed > 1  # it was not there any more
    assert long.future.done()


def test_what_waits_for_memory_is_made_exact_in_idle_time_only(make_service):
    service = make_service()
    ask(service, TALK, "auto")
    with held_up(service):
        jobs = [
            send(service, without(TALK, 2), "auto", max_tokens=20),
            send(service, talks()[0], owner="b", max_tokens=20),
        ]
    assert [job.future.result(20).reuse.exact for job in jobs] == [False, True]
    settle(service)
    held = [held for held in service.store._held.values() if held.owner == ""]
    assert all(each.exact for each in held)


def test_the_model_is_as_it_was_between_steps(make_service):
    service = make_service()
    model = service.store.model
    names, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def look(reply, job):
        seen.append(dict(model.named_modules()) == names and model.config._attn_implementation == "sdpa")

    with held_up(service):
        jobs = [send(service, talk, owner=f"{n}", watch=look) for n, talk in enumerate(talks())]
    for job in jobs:
        job.future.result(20)
    assert all(seen)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_states_of_a_reply_made_with_others_are_those_of_reading_it(make_service):
    service = make_service()
    with held_up(service):
        jobs = [send(service, talk, owner=f"{n}") for n, talk in enumerate(talks())]
    for job in jobs:
        job.future.result(20)
    for held in service.submit(lambda job: list(service.store._held.values())).future.result(5):
        read = kv.ErasableContext(service.store.model)
        read.append_ids(held.context.live_ids)
        assert relative(states(held.context.cache), states(read.cache)) < 1e-5
