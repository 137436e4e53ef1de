"""Asking before the erases, now, and after recomputing: the answers are those of such contexts, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from serving_helpers import PARTS, event_list, servers, session, tiny_service

import kveraser as kv
from conftest import make_tokenizer, random_eraser, same, states, text_model
from kveraser.errors import JobCancelledError
from kveraser.serving.sessions.asking import compare_versions
from kveraser.serving.sessions.comparing import Question, compare
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.sessions.showing import show
from kveraser.serving.worker import Job

ASKED = "the code is"


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def context(*parts):
    model = text_model()
    made = kv.ErasableContext(model, make_tokenizer(), random_eraser(model))
    for part in parts:
        made.append(part)
    return made


def job():
    return Job(lambda job: None, 60)


def test_the_three_answers_are_those_of_three_such_contexts():
    ctx = context(*PARTS)
    ctx.erase(PARTS[1])
    found = {answer.version: answer for answer in compare(ctx, Question(ASKED, 12), job()).answers}
    assert list(found) == ["before", "now", "recomputed"]
    assert found["before"].text == context(*PARTS).generate(ASKED, max_new_tokens=12)
    assert found["now"].text == ctx.generate(ASKED, max_new_tokens=12)
    assert found["recomputed"].text == context(PARTS[0], PARTS[2]).generate(ASKED, max_new_tokens=12)
    assert [answer.exact for answer in found.values()] == [True, False, True]
    assert found["now"].methods == ("kveraser",)
    assert found["before"].edit_seconds is None
    assert found["now"].edit_seconds == ctx.receipts[0].seconds


def test_a_chat_is_asked_as_a_chat():
    ctx, fresh = context(), context()
    for index, part in enumerate(PARTS):
        ctx.append_message("tool", part, id=f"call-{index}")
        fresh.append_message("tool", part)
    ctx.erase("call-1")
    before, now, _ = compare(ctx, Question("the code?", 8), job()).answers
    assert now.text == ctx.generate("the code?", max_new_tokens=8)
    assert before.text == fresh.generate("the code?", max_new_tokens=8)


@pytest.mark.parametrize("gone", [(0,), (2,), (0, 1, 2), (0, 2)])
def test_any_part_may_be_the_erased_one(gone):
    ctx = context(*PARTS)
    for part in gone:
        ctx.erase(PARTS[part])
    before, now, recomputed = compare(ctx, Question(ASKED, 8), job()).answers
    assert before.text == context(*PARTS).generate(ASKED, max_new_tokens=8)
    assert now.text == ctx.generate(ASKED, max_new_tokens=8)
    kept = [part for index, part in enumerate(PARTS) if index not in gone]
    assert recomputed.text == context(*kept).generate(ASKED, max_new_tokens=8)


@pytest.mark.parametrize("method", ["kveraser", "delete-and-shift", "full-recompute"])
def test_comparing_leaves_the_session_as_it_is_bit_for_bit(method):
    ctx = context(*PARTS)
    ctx.erase("the code is 99, ", method)
    before, ledger = states(ctx.cache), (ctx.live_ids, ctx.erased, ctx.receipts, ctx.exact, len(ctx))
    compare(ctx, Question(ASKED, 8), job())
    assert same(before, states(ctx.cache))
    assert ledger == (ctx.live_ids, ctx.erased, ctx.receipts, ctx.exact, len(ctx))


def test_the_distributions_are_those_of_the_place_where_the_answers_part():
    ctx = context(*PARTS)
    ctx.erase(PARTS[1])
    found = compare(ctx, Question(ASKED, 12, top=3), job())
    shown = found.distributions
    assert set(shown.probabilities) == {"before", "now", "recomputed"}
    assert shown.kl["recomputed"] == 0
    assert all(value >= 0 for value in shown.kl.values())
    assert all(answer.text.startswith(shown.after) for answer in found.answers)
    fresh = context(PARTS[0], PARTS[2])
    chances = fresh.logits(ASKED + shown.after)[-1].softmax(-1)
    for token, chance in zip(shown.tokens, shown.probabilities["recomputed"], strict=True):
        ids = [
            i for i in range(len(chances)) if make_tokenizer().decode([i], clean_up_tokenization_spaces=False) == token
        ]
        assert any(chance == pytest.approx(float(chances[i]), abs=1e-4) for i in ids)
    assert 3 <= len(shown.tokens) <= 9


def test_with_nothing_erased_there_is_one_answer():
    found = compare(context(*PARTS), Question(ASKED, 4), job())
    assert [answer.version for answer in found.answers] == ["now"]
    assert found.distributions.kl == {}
    purged = context(*PARTS)
    purged.purge(purged.erase(PARTS[1]))
    assert [answer.version for answer in compare(purged, Question(ASKED, 4), job()).answers] == ["now"]


def test_an_answer_has_at_least_one_token_and_can_end_with_its_first_line(monkeypatch):
    ctx = context(*PARTS)
    plain = compare(ctx, Question(ASKED, 12), job()).answers[0]
    first = ctx.encode(plain.text)[0]
    monkeypatch.setattr(ctx.model.generation_config, "eos_token_id", first)
    assert compare(ctx, Question(ASKED, 12), job()).answers[0].text


def test_an_answer_can_end_with_its_first_line(monkeypatch):
    ctx = context(*PARTS)
    plain = compare(ctx, Question(ASKED, 12), job()).answers[0]
    text = plain.text[:5]
    monkeypatch.setattr(ctx.tokenizer, "decode", lambda ids, **_: "\n" + (text + "\n" if len(ids) > 2 else ""))
    assert compare(ctx, Question(ASKED, 12, first_line=True), job()).answers[0].tokens == 3


def test_streaming_a_comparison_tells_the_same_as_not_streaming(serve):
    server = serve()
    at = session(server, *PARTS)
    server.call("POST", f"{at}/erase", json={"text": PARTS[1]})
    body = {"prompt": ASKED, "max_tokens": 12, "top": 2}
    plain = server.call("POST", f"{at}/compare", json=body).json()
    events = event_list(server.call("POST", f"{at}/compare", json={**body, "stream": True}).text)
    assert events[-1]["distributions"] == plain["distributions"]
    for answer in plain["answers"]:
        version = answer["version"]
        mine = [event for event in events if event.get("version") == version]
        assert "".join(event.get("text", "") for event in mine) == answer["text"]
        assert mine[-1]["answer"]["text"] == answer["text"]
        assert mine[-1]["answer"]["exact"] == answer["exact"]
        read = [(event["done"], event["total"]) for event in mine if "total" in event]
        assert bool(read) == (version != "now")
        assert not read or read[-1][0] == read[-1][1]


def test_what_cannot_be_compared_is_refused_with_a_reason(serve):
    server = serve(keys=("alpha", "beta"), cache_budget=400_000)
    at = session(server, *PARTS, key="alpha")
    server.call("POST", f"{at}/erase", "alpha", json={"text": PARTS[1]})
    ask = {"prompt": ASKED, "max_tokens": 4}
    assert server.call("POST", f"{at}/compare", json=ask).status_code == 401
    assert server.call("POST", f"{at}/compare", "beta", json=ask).json()["error"]["code"] == "session_not_found"
    for body in ({"prompt": ""}, {"prompt": "x", "top": 0}, {"prompt": "x", "max_tokens": 0}, {}):
        assert server.call("POST", f"{at}/compare", "alpha", json=body).status_code == 400
    long = {**ask, "prompt": "blue " * 400, "stream": True}
    reply = server.call("POST", f"{at}/compare", "alpha", json=long)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "ContextError")
    assert "cache budget" in reply.json()["error"]["message"]
    empty = session(server, key="alpha")
    assert "empty" in server.call("POST", f"{empty}/compare", "alpha", json=ask).json()["error"]["message"]
    assert server.service.store.bytes <= 400_000


@pytest.mark.parametrize("calls", [1, 4, 12, 20])
def test_a_comparison_that_nobody_waits_for_stops_and_changes_nothing(calls):
    class Leaving(Job):
        count = 0

        def check(self):
            self.count += 1
            if self.count == calls:
                self.cancel()
            super().check()

    service = tiny_service(cache_budget=1 << 24)
    try:
        sessions = Sessions(service.store, service.limits)
        name = sessions.create("me").id
        for part in PARTS:
            sessions.append_text("me", name, part)
        sessions.erase("me", name, Selection(text=PARTS[1]), "kveraser")
        context = sessions.get("me", name).context
        before, shown = states(context.cache), show(sessions.get("me", name))
        leaving = Leaving(lambda job: None, 60)
        with pytest.raises(JobCancelledError):
            compare_versions(sessions, "me", name, Question(ASKED, 8), leaving)
        assert leaving.count == calls
        assert same(before, states(context.cache))
        assert shown == show(sessions.get("me", name))
    finally:
        service.close()


def test_the_comparison_does_not_touch_chance():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    compare(context(*PARTS), Question(ASKED, 4), job())
    assert torch.equal(torch.rand(1), expected)
