"""The proxy before vLLM servers: routing, erasing, failing over, streaming, isolation. The servers are stand-ins over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import TALK, event_list, messages, without
from transformers.cache_utils import DynamicCache
from vllm_upstream import MODEL, Upstream, ids_of, proxied, tiny_eraser

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.engines.vllm.proxy.comparing import Use, compare, unedited
from kveraser.engines.vllm.proxy.conversations import Conversation, Conversations, fresh_view
from kveraser.engines.vllm.proxy.editing import Sessions
from kveraser.engines.vllm.proxy.front import Front, ProxyOptions
from kveraser.engines.vllm.proxy.passing import Attempt, open_first
from kveraser.engines.vllm.proxy.replicas import Replicas
from kveraser.engines.vllm.proxy.replies import EditReport, Events, Told, begins
from kveraser.errors import EngineError, OptionError
from kveraser.spans import Span

PATH = "/v1/chat/completions"
MORE = [*TALK, ("assistant", "the car is blue"), ("user", "and is the car fast?")]
"""The talk with a reply and another question."""


HTTP = httpx.Client(trust_env=False, timeout=60)


@pytest.fixture(autouse=True)
def _long_cooldown(monkeypatch):
    """So that what has failed stays left alone on a slow machine, too."""
    monkeypatch.setattr("kveraser.engines.vllm.proxy.replicas.COOLDOWN", 600.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    with proxied([folder / "a", folder / "b"], keys=("alpha", "beta")) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared):
    """Two servers, which have read nothing yet."""
    for entry in list(shared.front.conversations):
        shared.front.conversations.remove(entry)
        shared.front._forget(entry)
    shared.wait_until(lambda: not any(up.engine.store.ids() for up in shared.ups))
    for up, replica in zip(shared.ups, shared.front.replicas.all, strict=True):
        up.fails, up.renders = None, True
        up.gate.set()
        up.chats.clear()
        up.headers.clear()
        up.paths.clear()
        up.engine.prompts.clear()
        replica.down_until = 0.0
    return shared


def body_of(talk, **options):
    return {"model": MODEL, "messages": messages(talk), "max_tokens": 4, "temperature": 0, **options}


def ask(proxy, talk, key="alpha", **options):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return HTTP.post(proxy.address + PATH, json=body_of(talk, **options), headers=headers)


def text_of(reply):
    if reply.headers["content-type"].startswith("text/event-stream"):
        choices = [choice for event in event_list(reply.text) for choice in event["choices"]]
        return "".join(choice["delta"].get("content", "") for choice in choices)
    return reply.json()["choices"][0]["message"]["content"]


def report_of(reply):
    if reply.headers["content-type"].startswith("text/event-stream"):
        return event_list(reply.text)[-1].get("kveraser")
    return reply.json().get("kveraser")


class Transformers:
    """What a context of transformers says to the same erases, with the ids that a client sends."""

    def __init__(self, talk):
        self.context = kv.ErasableContext(text_model(), make_tokenizer(), tiny_eraser())
        self.ids = ids_of(messages(talk))
        self.where = list(range(len(self.ids)))
        self.context.append(self.ids)

    def drop(self, talk):
        """Go on with a talk that leaves something out, or does not."""
        wanted = ids_of(messages(talk))
        found = compare(self.ids, wanted, frozenset([1]))
        spans = [Span(self.where[start], self.where[end - 1] + 1) for start, end in found.removals]
        if spans:
            self.context.erase(spans)
        for start, end in reversed(found.removals):
            del self.where[start:end]
        new = wanted[found.new_from :]
        added = self.context.append(new)
        self.where += list(added)
        self.ids = wanted
        return self.says()

    def says(self):
        return make_tokenizer().decode(self.context.generate_ids([], max_new_tokens=4), skip_special_tokens=True)


def plainly(talk):
    """What the model says to a talk that was never edited."""
    cache, ids, new = DynamicCache(), torch.tensor([ids_of(messages(talk))]), []
    with torch.no_grad():
        while len(new) < 4 and make_tokenizer().eos_token_id not in new:
            new.append(int(text_model()(ids, past_key_values=cache).logits[0, -1].argmax()))
            ids = torch.tensor([new[-1:]])
    return make_tokenizer().decode(new, skip_special_tokens=True)


def held(proxy):
    (entry,) = proxy.front.conversations
    return entry


# -- what is not edited ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_edit_is_passed_on_and_answered_byte_for_byte(proxy, stream):
    raw = json.dumps({"x-unknown": [1.50, "é"], "stream": stream, **body_of(TALK)}, indent=3).encode()
    headers = {"Authorization": "Bearer alpha", "X-Request-Id": "mïne".encode(), "content-type": "application/json"}
    reply = HTTP.post(proxy.address + PATH, content=raw, headers=headers)
    assert proxy.ups[0].chats == [raw]
    assert proxy.ups[0].headers[0]["x-request-id"].encode("latin-1") == "mïne".encode()
    assert "authorization" not in proxy.ups[0].headers[0]
    direct = HTTP.post(proxy.ups[0].address + PATH, content=raw)
    assert (reply.content, reply.headers["content-type"]) == (direct.content, direct.headers["content-type"])
    assert text_of(reply) == plainly(TALK)
    assert reply.headers["x-kveraser-replica"] == "0"


def test_errors_of_the_server_come_back_as_they_are(proxy):
    raw = b'{"model": "tiny", "messages": 7}'
    reply = HTTP.post(proxy.address + PATH, content=raw, headers={"Authorization": "Bearer alpha"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "messages: needed")
    assert [len(up.chats) for up in proxy.ups] == [1, 0]


@pytest.mark.parametrize(
    "field",
    [{"echo": True}, {"prompt_logprobs": 0}, {"return_token_ids": True}, {"cache_salt": "mine"}, {"n": 2}],
)
def test_with_fields_that_show_the_prompt_or_keep_it_apart_nothing_is_edited(proxy, field):
    ask(proxy, TALK)
    reply = ask(proxy, without(MORE, 2), **field)
    assert report_of(reply) is None
    assert [json.loads(raw).get("kv_transfer_params") for up in proxy.ups for raw in up.chats] == [None, None]


@pytest.mark.parametrize("renders", [False, "otherwise"])
def test_a_server_that_does_not_render_is_passed_on_to(proxy, renders):
    for up in proxy.ups:
        up.renders = renders
    ask(proxy, TALK)
    assert text_of(ask(proxy, without(MORE, 2))) == plainly(without(MORE, 2))
    assert not len(proxy.front.conversations)


def test_conversations_with_an_adapter_are_not_edited(proxy):
    ask(proxy, TALK, model="eraser")
    assert report_of(ask(proxy, without(MORE, 2), model="eraser")) is None
    assert "/v1/completions" not in proxy.ups[0].paths


def test_an_edit_that_saves_too_little_or_does_not_fit_is_not_made(proxy, monkeypatch):
    ask(proxy, TALK)
    monkeypatch.setattr(proxy.front.replicas.all[0], "max_tokens", len(ids_of(messages(without(MORE, 2)))) + 8)
    assert (
        report_of(ask(proxy, without(MORE, 2))) is None
    )  # as it is, it fits; the erased tokens would keep their places
    monkeypatch.undo()
    ask(proxy, TALK, "beta")
    monkeypatch.setattr(proxy.front, "options", ProxyOptions(min_saved=2000))
    assert report_of(ask(proxy, without(MORE, 2), "beta")) is None


def test_what_readers_by_the_length_take_is_not_saved(proxy, monkeypatch):
    for key, readers in (("alpha", 70), ("beta", None)):
        ask(proxy, TALK, key)
        monkeypatch.setattr(proxy.front, "options", ProxyOptions(min_saved=50, readers=readers))
        report = report_of(ask(proxy, without(MORE, 2), key))
        assert (report is None) == (readers is None)  # of 16 tokens erased, 70 readers


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_message_is_erased_where_it_was_read_and_the_conversation_goes_on_from_there(proxy, stream):
    expected = Transformers(TALK)
    assert text_of(ask(proxy, TALK, stream=stream)) == expected.says()
    reply = ask(proxy, without(MORE, 2), stream=stream)
    assert text_of(reply) == expected.drop(without(MORE, 2))
    report = report_of(reply)
    assert (report["method"], report["exact"], report["spans"]) == ("kveraser", False, [[70, 86]])
    assert report["tokens_reused"] == len(ids_of(messages(TALK))) - 16
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    reply = ask(proxy, longer, stream=stream)
    assert text_of(reply) == expected.drop(longer)
    assert report_of(reply)["method"] == "prefix"
    again = [*without(longer, 3), ("assistant", "no"), ("user", "what is the color?")]
    reply = ask(proxy, again, stream=stream)
    assert text_of(reply) == expected.drop(again)
    assert report_of(reply)["method"] == "kveraser"
    assert [len(up.chats) for up in proxy.ups] == [4, 0]
    assert len(proxy.ups[0].engine.store.ids()) == 1
    assert len(proxy.front.conversations) == 1


def test_replies_from_an_edited_context_count_the_clients_tokens_and_show_nothing_of_the_edit(proxy):
    ask(proxy, TALK)
    wanted = len(ids_of(messages(without(MORE, 2))))
    reply = ask(proxy, without(MORE, 2))
    usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (wanted, wanted + 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == report_of(reply)["tokens_reused"]
    sent = json.loads(proxy.ups[0].chats[-1])["kv_transfer_params"]["kveraser"]["edit"]
    assert sent in proxy.ups[0].engine.store.ids()
    assert sent not in reply.text
    assert "kv_transfer_params" not in reply.json()


def test_no_erased_id_is_sent_to_the_engine_after_the_erase(proxy):
    secret = "QJZ QJZ QJZ QJZ and the code is QJZ"
    talk = [*TALK[:2], ("tool", secret), *TALK[3:]]
    ask(proxy, talk)
    ask(proxy, without([*talk, *MORE[-2:]], 2))
    proxy.ups[0].engine.prompts.clear()
    ask(proxy, [*without([*talk, *MORE[-2:]], 2), ("assistant", "yes"), ("user", "and more?")])
    assert all("QJZ" not in make_tokenizer().decode(ids) for ids in proxy.ups[0].prompts)
    assert "QJZ" not in make_tokenizer().decode(held(proxy).view.ids)


def test_the_openai_client_needs_no_change(proxy):
    client = openai.OpenAI(base_url=f"{proxy.address}/v1", api_key="alpha", max_retries=0)
    expected = Transformers(TALK)
    for talk in (TALK, without(MORE, 2)):
        with client.chat.completions.create(**body_of(talk), stream=True) as stream:
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == expected.drop(without(MORE, 2))
    assert [model.id for model in client.models.list()] == ["tiny", "eraser"]


def test_a_policy_of_a_request_goes_before_the_proxys_and_is_not_passed_on(proxy):
    ask(proxy, TALK, kveraser={"policy": "exact"})
    reply = ask(proxy, without(MORE, 2), kveraser={"policy": "exact"})
    assert text_of(reply) == plainly(without(MORE, 2))
    assert not any(b"kveraser" in raw for raw in proxy.ups[0].chats)
    ask(proxy, TALK, "beta")
    assert report_of(ask(proxy, without(MORE, 2), "beta", kveraser={"policy": "kveraser"}))["method"] == "kveraser"
    refused = ask(proxy, TALK, kveraser={"policy": "magic"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kveraser")


@pytest.mark.parametrize("wish", [{"must_forget": ["1234"]}, {"max_residual": 0.0}])
def test_a_wish_that_only_the_server_of_its_own_meets_is_refused_by_its_name(proxy, wish):
    reply = ask(proxy, TALK, kveraser={"policy": "auto", **wish})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "kveraser")
    assert next(iter(wish)) in reply.json()["error"]["message"]
    assert not any(up.chats for up in proxy.ups)
    assert ask(proxy, TALK, kveraser={"max_residual": None, "must_forget": []}).status_code == 200


def test_auto_replaces_the_edited_context_by_an_exact_one_in_the_background(proxy):
    ask(proxy, TALK)
    assert report_of(ask(proxy, without(MORE, 2), kveraser={"policy": "auto"}))["method"] == "kveraser"
    proxy.wait_until(lambda: held(proxy).session is None)
    assert proxy.ups[0].prompts[-1] == ids_of(messages(without(MORE, 2)))
    proxy.wait_until(lambda: not proxy.ups[0].engine.store.ids())
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    reply = ask(proxy, longer)
    assert report_of(reply) is None
    assert text_of(reply) == plainly(longer)


def test_a_refresh_waits_until_nothing_is_answered_from_the_edited_context(proxy):
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    entry = held(proxy)
    entry.busy += 1
    entry.prefilled = entry.view.ids
    proxy.front.refresher.settle(entry)
    assert entry.session is not None
    entry.busy -= 1
    entry.prefilled = entry.view.ids[:-1] + 1
    proxy.front.refresher.settle(entry)
    assert entry.session is not None, "what was prefilled is not what the conversation is now"


def test_a_conversation_that_is_being_answered_from_is_not_changed(proxy):
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    again = [*without(longer, 3), ("assistant", "no"), ("user", "what is the color?")]
    proxy.ups[0].gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, proxy, longer, stream=True)
        proxy.wait_until(lambda: any(entry.busy for entry in proxy.front.conversations))
        reply = ask(proxy, again)
        proxy.ups[0].gate.set()
        assert report_of(first.result())["method"] == "prefix"
    assert report_of(reply) is None
    assert text_of(reply) == plainly(again)
    assert not any(entry.busy for entry in proxy.front.conversations)


def test_requests_at_once_of_one_conversation_are_all_answered_rightly(proxy):
    expected = Transformers(TALK)
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    expected.drop(without(MORE, 2))
    ends = [
        [*without(MORE, 2), ("assistant", "yes"), ("user", f"is it, {word}?")]
        for word in ("really", "so", "new", "old")
    ]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda talk: ask(proxy, talk), ends))
    for talk, reply in zip(ends, replies, strict=True):
        branch = Transformers(TALK)
        branch.drop(without(MORE, 2))
        assert text_of(reply) in (branch.drop(talk), plainly(talk))
    assert not any(entry.busy or entry.changing for entry in proxy.front.conversations)


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_an_edited_context_answers_its_own_key_alone(proxy):
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    reply = ask(proxy, without(MORE, 2), "beta")
    assert report_of(reply) is None
    assert text_of(reply) == plainly(without(MORE, 2))
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    assert report_of(ask(proxy, longer, "beta")) is None
    assert report_of(ask(proxy, longer, "alpha"))["method"] == "prefix"


def test_a_conversation_that_only_begins_like_an_edited_one_gets_nothing_of_the_edit(proxy):
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    for sibling in ([*without(MORE, 2)[:-1], ("user", "and is the door?")], without(MORE, 2, 7)):
        reply = ask(proxy, sibling)
        assert report_of(reply) is None
        assert text_of(reply) == plainly(sibling)
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    assert report_of(ask(proxy, longer))["method"] == "prefix", "which itself is still there"


def test_what_a_template_puts_at_the_end_of_a_prompt_alone_may_be_missing():
    start, entry = frozenset([1]), Conversation(("a", "m"), fresh_view(np.array([1, 5, 6, 2, 1, 7, 8, 9])), 0)
    for end, goes_on in ((8, True), (6, True), (5, True), (4, True), (3, False)):
        found = compare(entry.view.ids, [*entry.view.ids[:end], 77, 78])
        assert entry.goes_on(found, start) is goes_on
        assert entry.goes_on(found, frozenset()) is (end == 8)


def test_nothing_is_passed_on_without_a_key(proxy):
    for key in (None, "gamma"):
        for path in (PATH, "/v1/completions", "/metrics", "/anything"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert HTTP.request("GET" if path == "/metrics" else "POST", proxy.address + path, headers=headers,
                                 content=b"{}").status_code == 401  # fmt: skip
    assert not any(up.paths for up in proxy.ups)
    assert HTTP.get(f"{proxy.address}/healthz").json()["status"] == "ok"


DROP = {"kv_transfer_params": {"kveraser": {"drop": ["0" * 32]}}}
_WHOLE = json.dumps({**body_of(TALK), **DROP})
_TWICE = _WHOLE.removesuffix("}") + ', "kv_transfer_params": null}'


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (_WHOLE.encode(), "kv_transfer_params: edits"),
        (json.dumps({**body_of(TALK), "vllm_xargs": DROP}).encode(), "kv_transfer_params: edits"),
        (_WHOLE.replace("kv_", r"\u006bv_").encode(), "kv_transfer_params: edits"),
        (_TWICE.encode(), "'kv_transfer_params' twice"),
        (_WHOLE.replace('"tiny"', f'"tiny", "x": {"[" * 5000}{"]" * 5000}').encode(), "nested too deeply"),
        (_WHOLE.encode("utf-8-sig"), "in UTF-8"),
        (_WHOLE.encode("utf-16"), "in UTF-8"),
        (_WHOLE.encode("utf-16-le"), "in UTF-8"),
        (_WHOLE.replace("tiny", "é").encode("latin-1"), "in UTF-8"),
        (f"[{_WHOLE}]".encode(), "no JSON object"),
        (_WHOLE.removesuffix("}").encode(), "no JSON object"),
        (f'{{"n": {"9" * 5000}}}'.encode(), "no JSON object"),
    ],
)  # fmt: skip
def test_states_are_not_to_be_reached_through_the_proxy(proxy, path, raw, words):
    headers = {"Authorization": "Bearer alpha", "content-type": "application/json"}
    reply = HTTP.post(proxy.address + path, content=raw, headers=headers)
    assert (reply.status_code, reply.json().get("error", {}).get("type")) == (400, "invalid_request_error")
    assert words in reply.json()["error"]["message"]
    assert not any(up.paths for up in proxy.ups)


@pytest.mark.parametrize(
    "path", ["/inference/v1/generate", "/v1/load_lora_adapter", "/sleep", "/v1/chat/completions/render", "/"]
)
def test_what_is_not_for_clients_is_refused_with_a_reason(proxy, path):
    reply = HTTP.post(proxy.address + path, json={}, headers={"Authorization": "Bearer alpha"})
    assert reply.status_code == 404
    assert "is not passed on" in reply.json()["error"]["message"]
    assert not any(up.paths for up in proxy.ups)


def test_completions_and_models_are_passed_on(proxy):
    headers = {"Authorization": "Bearer alpha"}
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2}
    reply = HTTP.post(f"{proxy.address}/v1/completions", json=body, headers=headers)
    direct = HTTP.post(f"{proxy.ups[0].address}/v1/completions", json=body)
    assert reply.content == direct.content
    assert HTTP.get(f"{proxy.address}/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"


# -- which server ------------------------------------------------------------------------------------------------------


def test_new_conversations_go_to_the_server_that_is_least_busy_and_stay_where_they_were_read(proxy):
    proxy.ups[0].gate.clear()
    other = [("user", "look up something else"), ("tool", "no 7"), ("user", TALK[3][1])]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, proxy, TALK, stream=True)
        proxy.wait_until(lambda: proxy.ups[0].chats)
        assert ask(proxy, other).headers["x-kveraser-replica"] == "1"
        proxy.ups[0].gate.set()
        assert first.result().headers["x-kveraser-replica"] == "0"
    assert ask(proxy, MORE).headers["x-kveraser-replica"] == "0"
    reply = ask(proxy, without([*other, ("user", "and then?")], 1))
    assert (report_of(reply)["method"], reply.headers["x-kveraser-replica"]) == ("kveraser", "1")
    assert proxy.ups[1].engine.store.ids()


@pytest.mark.parametrize(("fails", "stream"), [("status", False), ("status", True), ("event", True), ("cut", False)])
def test_a_server_that_fails_before_the_first_token_is_replaced_by_another_one(proxy, fails, stream):
    ask(proxy, TALK)
    proxy.ups[0].fails = fails
    reply = ask(proxy, MORE, stream=stream)
    assert reply.headers["x-kveraser-replica"] == "1"
    assert text_of(reply) == plainly(MORE)
    assert not proxy.front.replicas.all[0].is_up
    proxy.wait_until(lambda: all(replica.in_flight == 0 for replica in proxy.front.replicas.all))
    proxy.ups[0].fails = None
    longer = [*MORE, ("assistant", "yes"), ("user", "is it, really?")]
    assert ask(proxy, longer).headers["x-kveraser-replica"] == "1", "it has read it now"


async def heard_by(steps, ask):
    """What `ask` gives for the one server, which does a step with each request, and the numbers of the connections that these came on."""
    connections, heard = count(), []

    async def serve(reader, writer):
        number = next(connections)
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                await reader.readexactly(int(length[1]) if length else 0)
                step = steps[len(heard)]
                heard.append(number)
                assert b"Bearer theirs" in head
                writer.write(step)
                if b"Content-Length" not in step:
                    break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        replicas = Replicas([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], key="theirs", timeout=5)
        try:
            return await ask(replicas), heard, replicas.all[0].is_up
        finally:
            await replicas.close()


ANSWER, DROP_IT = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[7]", b""


async def twice(replicas):
    said = [await replicas.json(replicas.all[0], "/v1/models")]
    try:
        said.append(await replicas.json(replicas.all[0], f"{PATH}/render", {}))
    except EngineError:
        said.append(None)
    return said


def test_a_connection_that_a_server_has_closed_meanwhile_is_no_failure():
    said, heard, up = asyncio.run(heard_by([ANSWER, DROP_IT, ANSWER], twice))
    assert (said, heard, up) == ([[7], [7]], [0, 0, 1], True)


def test_a_request_is_not_sent_again_to_a_server_that_has_worked_on_it(monkeypatch):
    async def fresh(replicas):
        with pytest.raises(EngineError, match="cannot be reached"):
            await replicas.json(replicas.all[0], f"{PATH}/render", {})

    assert asyncio.run(heard_by([DROP_IT, ANSWER], fresh)) == (None, [0], False), "the connection was new"
    monkeypatch.setattr("kveraser.engines.vllm.proxy.replicas._AT_ONCE", -1.0)
    said, heard, up = asyncio.run(heard_by([ANSWER, DROP_IT, ANSWER], twice))
    assert (said, heard, up) == ([[7], None], [0, 0], False), "it took some time"


@pytest.mark.parametrize(
    ("answers", "asked", "status"),
    [
        ([None, 500, 503, 200], 3, 503),
        ([None, None, None, 200], 4, 200),
        (["off", "off", "full", 200], 4, 200),
        ([500, None, 200, 200], 3, 200),
        ([404, 200], 1, 404),
    ],
)
def test_a_request_that_two_servers_fail_on_is_given_up_and_those_that_are_not_there_do_not_count(
    answers, asked, status
):
    seen = []
    nobody = {None: httpx.ConnectError, "off": httpx.ConnectTimeout, "full": httpx.PoolTimeout}

    def answer(request):
        seen.append(request.url.host)
        status = answers[int(request.url.host)]
        if status in nobody:
            raise nobody[status]("nobody is there")
        return httpx.Response(status, stream=httpx.ByteStream(b"{}"))

    async def go():
        replicas = Replicas([f"http://{number}" for number in range(len(answers))], key=None, timeout=1)
        replicas._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        attempts = [Attempt(replica, b"{}") for replica in replicas.order()]
        opened = await open_first(replicas, attempts, "POST", PATH, {}, lambda _: None)
        await opened.close()
        assert all(replica.in_flight == 0 for replica in replicas.all)
        return opened.response.status_code

    assert asyncio.run(go()) == status
    assert seen == [str(number) for number in range(asked)]


def test_where_all_servers_fail_the_last_of_them_is_heard(proxy):
    for up in proxy.ups:
        up.fails = "status"
    reply = ask(proxy, TALK)
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "out of order")
    proxy.wait_until(lambda: all(replica.in_flight == 0 for replica in proxy.front.replicas.all))
    assert not len(proxy.front.conversations)


@pytest.mark.parametrize("stream", [False, True])
def test_where_an_edited_context_is_gone_the_request_is_passed_on_as_it_came(proxy, stream):
    ask(proxy, TALK)
    ask(proxy, without(MORE, 2))
    for name in proxy.ups[0].engine.store.ids():
        shutil.rmtree(proxy.ups[0].engine.store.folder / name)
    longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
    reply = ask(proxy, longer, stream=stream)
    assert report_of(reply) is None
    assert text_of(reply) == plainly(longer)
    assert reply.headers["x-kveraser-replica"] == "0"
    assert held(proxy).session is None
    assert proxy.front.replicas.all[0].is_up


@pytest.mark.parametrize("stream", [False, True])
def test_where_an_edited_context_fails_on_its_first_token_the_client_does_not_notice(proxy, stream):
    ask(proxy, TALK)
    proxy.ups[0].fails = "edits"
    reply = ask(proxy, without(MORE, 2), stream=stream)
    assert (reply.status_code, report_of(reply)) == (200, None)
    assert text_of(reply) == plainly(without(MORE, 2))


def test_an_erase_that_fails_leaves_the_request_as_it_came(proxy, monkeypatch):
    ask(proxy, TALK)
    monkeypatch.setattr(proxy.ups[0].engine, "broken", True)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, proxy, without(MORE, 2)).result()
    assert text_of(reply) == plainly(without(MORE, 2))
    assert reply.headers["x-kveraser-replica"] == "1"
    assert not any(up.engine.store.ids() for up in proxy.ups)


def test_an_erase_whose_answer_breaks_off_leaves_the_request_as_it_came(proxy):
    ask(proxy, TALK)
    proxy.ups[0].fails = "erases"
    reply = ask(proxy, without(MORE, 2))
    assert (reply.status_code, report_of(reply)) == (200, None)
    assert text_of(reply) == plainly(without(MORE, 2))


def test_a_reply_that_is_cut_in_its_middle_ends_with_an_error(proxy):
    proxy.ups[0].fails = "late"
    reply = ask(proxy, TALK, stream=True)
    *_, last = event_list(reply.text)
    assert last["error"]["code"] == "upstream_failed"
    assert len(proxy.ups[1].chats) == 0, "the client has seen a part of it already"


def test_events_come_as_they_are_made(proxy):
    ask(proxy, TALK)
    for talk in (MORE, without([*MORE, ("assistant", "yes"), ("user", "why?")], 2)):
        proxy.ups[0].gate.clear()
        headers = {"Authorization": "Bearer alpha"}
        body = body_of(talk, stream=True)
        with HTTP.stream("POST", proxy.address + PATH, json=body, headers=headers) as reply:
            data = reply.iter_raw()
            said = next(data)
            while said.count(b"\n\n") < 2:
                said += next(data)
            assert b"DONE" not in said
            proxy.ups[0].gate.set()
            assert b"".join(data).endswith(b"data: [DONE]\n\n")


def test_a_client_that_goes_away_leaves_nothing_busy(proxy):
    ask(proxy, TALK)
    proxy.ups[0].gate.clear()
    headers = {"Authorization": "Bearer alpha"}
    body = body_of(without(MORE, 2), stream=True)
    with HTTP.stream("POST", proxy.address + PATH, json=body, headers=headers) as reply:
        next(reply.iter_raw())
    proxy.wait_until(lambda: not any(replica.in_flight for replica in proxy.front.replicas.all))
    assert not any(entry.busy for entry in proxy.front.conversations)
    proxy.ups[0].gate.set()


def test_after_a_server_is_killed_its_conversations_go_on_elsewhere_by_prefill(tmp_path):
    with proxied([tmp_path / "a", tmp_path / "b"], policy="kveraser") as proxy:
        ask(proxy, TALK)
        assert report_of(ask(proxy, without(MORE, 2)))["method"] == "kveraser"
        proxy.front.replicas.all[0].url = "http://127.0.0.1:9"  # nobody listens there
        longer = [*without(MORE, 2), ("assistant", "yes"), ("user", "is it, really?")]
        reply = ask(proxy, longer)
        assert reply.headers["x-kveraser-replica"] == "1"
        assert text_of(reply) == plainly(longer)
        assert held(proxy).session is None
        health = HTTP.get(f"{proxy.address}/healthz").json()
        assert (health["status"], health["up"]) == ("degraded", 1)
        again = [*without(longer, 3), ("assistant", "no"), ("user", "what is the color?")]
        assert report_of(ask(proxy, again))["method"] == "kveraser", "and are edited there"
        proxy.front.replicas.all[1].url = "http://127.0.0.1:9"
        gone = ask(proxy, [*again, ("user", "and?")])
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "no_upstream")


def test_without_the_connector_everything_is_passed_on_and_when_it_stops_nothing_stays(tmp_path, monkeypatch):
    with proxied([tmp_path / "a"], hosts=("127.0.0.1",)) as proxy:
        ask(proxy, TALK)
        ask(proxy, without(MORE, 2))
        assert proxy.ups[0].engine.store.ids()
        foreign = HTTP.post(proxy.address + PATH, json=body_of(TALK), headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        metrics = HTTP.get(f"{proxy.address}/metrics").text
        assert 'kveraser_proxy_replies_total{method="kveraser"} 1.0' in metrics
        assert "kveraser_proxy_edited 1.0" in metrics
    assert not proxy.ups[0].engine.store.ids()

    monkeypatch.setattr(Upstream, "__init__", without_connector(Upstream.__init__))
    monkeypatch.setattr("vllm_upstream.Proxy.wait_until", lambda *_: None)
    with proxied([tmp_path / "b"]) as proxy:
        ask(proxy, TALK)
        assert text_of(ask(proxy, without(MORE, 2))) == plainly(without(MORE, 2))
        assert HTTP.get(f"{proxy.address}/healthz").json()["editing"] == 0


def without_connector(init):
    def changed(self, folder):
        init(self, folder)
        self.engine.about = None

    return changed


# -- what is remembered ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.booleans()), max_size=30),
    limit=st.integers(1, 6),
    tokens=st.integers(1, 120),
)
def test_what_is_remembered_stays_within_its_limits_and_the_greediest_owner_loses_first(steps, limit, tokens):
    gone = []
    store = Conversations(limit, tokens, gone.append)
    for owner, length, busy in steps:
        entry = Conversation((owner, "m"), fresh_view(kept_ids(length)), 0, busy=int(busy))
        before = {each: len(each.view) for each in store}
        gone.clear()
        store.put(entry)
        before[entry] = length
        for each in gone:
            assert not each.busy
            taken = {who: sum(size for other, size in before.items() if other.owner == who) for who in owners(before)}
            idle = {other.owner for other in before if not other.busy}
            assert taken[each.owner] == max(taken[who] for who in idle)
            del before[each]
        assert set(store) == set(before)
        assert store.size == sum(before.values())
        idle = any(not each.busy for each in store)
        assert not idle or (len(store) <= limit and store.size <= tokens)


def owners(entries):
    return {entry.owner for entry in entries}


def kept_ids(length):
    return np.arange(length, dtype=np.int64)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(9, 30), min_size=2, max_size=6),
    gone=st.sets(st.integers(1, 4), max_size=2),
    edit=st.booleans(),
)
def test_a_request_finds_the_conversation_of_its_owner_that_saves_the_most(lengths, gone, edit):
    store = Conversations(100, 10_000, lambda _: None)
    parts = [np.arange(100 * n, 100 * n + length) for n, length in enumerate(lengths)]
    whole = np.concatenate(parts)
    entries = [Conversation(("a", "m"), fresh_view(whole[:cut]), 0) for cut in (5, len(whole), len(whole) // 2)]
    for entry in entries:
        store.put(entry)
    wanted = np.concatenate([*(part for n, part in enumerate(parts) if n not in gone), [7777, 7778]])
    assert asyncio.run(store.find(("b", "m"), wanted, edit=edit)) is None
    entry, found = asyncio.run(store.find(("a", "m"), wanted, edit=edit))
    gains = [(compare if edit else unedited)(each.view.ids, wanted).gain for each in entries]
    whole = found.new_from == len(entry.view) and 2 * found.gain >= len(wanted)
    assert found.gain == max(gains) or whole
    kept = [entry.view.ids[a:b] for a, b in kept_runs(found)]
    assert (np.concatenate(kept) == wanted[: found.new_from]).all()
    assert edit or found.removals == ()


def kept_runs(found):
    edges = [0, *(edge for removal in found.removals for edge in removal), found.kept_until]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture
def comparing(monkeypatch):
    """A store with a conversation of an owner, and what is called in a thread when it is compared."""
    store, calls = Conversations(100, 10_000, lambda _: None), []
    entry = Conversation(("a", "m"), fresh_view(kept_ids(40)), 0)
    store.put(entry)

    def slowly(cached, wanted, starts):
        if calls:
            calls.pop()()
        return compare(cached, wanted, starts)

    monkeypatch.setattr("kveraser.engines.vllm.proxy.comparing.compare", slowly)
    return store, entry, calls


def test_other_requests_go_on_while_conversations_are_compared(proxy, monkeypatch):
    ask(proxy, TALK)
    begun, gate = threading.Event(), threading.Event()

    def slowly(cached, wanted, starts):
        begun.set()
        assert gate.wait(60)
        return compare(cached, wanted, starts)

    monkeypatch.setattr("kveraser.engines.vllm.proxy.comparing.compare", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, proxy, MORE)
        assert begun.wait(60)
        assert text_of(ask(proxy, TALK, "beta")) == plainly(TALK)
        assert not first.done()
        gate.set()
        assert text_of(first.result()) == plainly(MORE)


def test_what_changes_while_it_is_compared_is_compared_again(comparing):
    store, entry, calls = comparing
    calls.append(lambda: setattr(entry, "view", fresh_view(kept_ids(45))))
    assert asyncio.run(store.find(("a", "m"), kept_ids(50), edit=True)) == (entry, Use((), 45, 45))
    calls.append(lambda: store.remove(entry))
    assert asyncio.run(store.find(("a", "m"), kept_ids(50), edit=True)) is None
    store.put(entry)
    calls += [lambda: setattr(entry, "view", fresh_view(entry.view.ids))] * 9
    assert asyncio.run(store.find(("a", "m"), kept_ids(50), edit=True)) is None
    assert calls, "that has an end"


def test_where_nothing_may_be_taken_out_only_beginnings_are_compared(comparing):
    store, entry, calls = comparing
    calls.append(lambda: 1 / 0)
    wanted = np.concatenate([kept_ids(20), kept_ids(40)[22:]])
    assert asyncio.run(store.find(("a", "m"), wanted, edit=False)) == (entry, Use((), 20, 20))
    calls.clear()
    assert asyncio.run(store.find(("a", "m"), wanted, edit=True)) == (entry, Use(((20, 22),), 40, 38))


def test_what_has_to_go_is_dropped_on_the_server_too(tmp_path):
    with proxied([tmp_path / "a"], conversations=1) as proxy:
        ask(proxy, TALK)
        ask(proxy, without(MORE, 2))
        assert proxy.ups[0].engine.store.ids()
        ask(proxy, [("user", "something else entirely, of which nothing has been read")])
        proxy.wait_until(lambda: not proxy.ups[0].engine.store.ids())
        assert len(proxy.front.conversations) == 1


@pytest.mark.parametrize(
    ("urls", "words"), [([], "at least one"), (["localhost:1"], "http://"), (["http://a", "http://a/v1"], "2 times")]
)
def test_addresses_that_cannot_be_are_named(urls, words):
    with pytest.raises(OptionError, match=words):
        Front(urls, ProxyOptions())


@pytest.mark.parametrize(
    "options", [{"conversations": 0}, {"tokens": 0}, {"timeout": 0}, {"min_saved": -1}, {"readers": -1}]
)
def test_options_that_cannot_be_are_named(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        ProxyOptions(**options)


@pytest.mark.parametrize(("own", "readers", "taken"), [(None, 70, 70), (None, None, None), (32, 70, 32), (0, 70, 0)])
def test_readers_are_as_many_as_the_proxy_was_told_unless_a_trained_eraser_has_its_own_number(
    monkeypatch, own, readers, taken
):
    opened = SimpleNamespace(repair=own, tokenizer=make_tokenizer())
    monkeypatch.setattr("kveraser.engines.vllm.proxy.editing.VLLMSession", lambda *args, **options: opened)
    sessions = Sessions(None, 1.0, readers=readers)
    assert sessions.open("http://a", "m").repair == taken
    sessions.stop()


# -- streams -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab:{} ", max_size=8).map(lambda text: f"data: {text}".encode())), st.integers(1, 9))
def test_a_stream_is_cut_into_its_events_wherever_its_pieces_end(events, size):
    whole, cutter = b"".join(event + b"\n\n" for event in events), Events()
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert [event for piece in pieces for event in cutter.push(piece)] == events
    assert cutter.rest == b""


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b": a comment", "nothing"),
        (b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}', "nothing"),
        (b'data: {"choices": [{"delta": {"role": "assistant", "content": "a"}}]}', "reply"),
        (b'data: {"choices": [{"delta": {"role": "assistant"}, "finish_reason": "stop"}]}', "reply"),
        (b'data: {"choices": [{"delta": {"tool_calls": [{}]}}]}', "reply"),
        (b'data: {"choices": [{"text": "a"}]}', "reply"),
        (b"data: [DONE]", "reply"),
        (b"data: 7", "reply"),
        (b'data: {"error": {"message": "a", "code": 400}}', "error"),
        (b'data: {"error": {"message": "a", "code": 500}}', "failure"),
        (b'data: {"error": "a"}', "failure"),
    ],
)
def test_the_first_token_of_a_stream_is_told_from_what_comes_before_it(event, kind):
    assert begins(event) == kind


def test_a_request_uses_what_is_left_of_a_conversation_when_runs_are_taken_out():
    have, rest = list(range(10, 60)), list(range(100, 120))
    use = compare(have, [*have[:9], *have[12:], *rest])
    assert use == Use(((9, 12),), 50, 47)
    assert (use.prefix, use.gain) == (9, 44)
    assert unedited(np.array(have), np.array([*have[:9], *have[12:]])) == Use((), 9, 9)
    assert compare(have, [*have[:9], 7, 7, 7, *rest]) == Use((), 9, 9)
    assert compare(have, rest) == Use((), 0, 0)


@pytest.mark.parametrize("text", [b"<html>busy</html>", b"[1, 2]", b"", b"\xff"])
def test_a_reply_that_is_no_object_of_json_is_passed_on_as_it_came(text):
    told = Told(EditReport("kveraser", False, (), 0, 0, 0.0), prompt_tokens=3)
    assert told.whole(text) == text
    assert json.loads(told.whole(b'{"usage": {"completion_tokens": 2}}'))["usage"]["total_tokens"] == 5
