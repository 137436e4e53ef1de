"""Anthropic's Messages API: what is accepted, what is answered, and how it is streamed."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_helpers import NAME, running, servers, tiny_service, tool_tokenizer

from kveraser.serving.anthropic.replies import BlockEvents
from kveraser.serving.chat.reading import CallPiece, TextPiece, ThinkingPiece
from kveraser.serving.decoding import Decoding, Delta

ASK = [{"role": "user", "content": "what is the code of the door?"}]
SCHEMA = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
LOOK = {"name": "look", "description": "looks", "input_schema": SCHEMA}
DOOR = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'
CAR = '<tool_call>\n{"name": "look", "arguments": {"what": "the car"}}\n</tool_call>'


@pytest.fixture
def serve():
    with servers() as make:
        yield lambda *args, **options: make(*args, tokenizer=tool_tokenizer(), **options)


def post(server, talk=ASK, key=None, path="/v1/messages", **changes):
    body = {"model": NAME, "messages": talk, "max_tokens": 300, "temperature": 0, **changes}
    if path != "/v1/messages":
        body = {name: value for name, value in body.items() if name not in ("max_tokens", "temperature")}
    return server.call("POST", path, key, json=body)


def good(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()


def count(server, talk=ASK, **changes):
    return good(post(server, talk, path="/v1/messages/count_tokens", **changes))


def events_of(text):
    """The events of a stream; every one is named by its type."""
    found = []
    for entry in text.split("\n\n"):
        if entry:
            name, data = entry.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def put_together(events):
    """A message as clients put it together."""
    message, texts = None, {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                texts[event["index"]] = texts.get(event["index"], "") + delta["partial_json"]
            else:
                block[delta["type"].removesuffix("_delta")] += delta[delta["type"].removesuffix("_delta")]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
            message |= {k: v for k, v in event.items() if k in ("kveraser", "context_management")}
    for index, text in texts.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def comparable(message):
    """What of a message must not differ between two requests for the same."""
    blocks = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return blocks, message["stop_reason"], message["stop_sequence"], message["usage"]["output_tokens"], message["kveraser"].get("malformed_calls")  # fmt: skip


def test_a_message_is_answered(serve, say):
    say("it is 1234")
    reply = post(serve(), system="be kind")
    message = good(reply)
    assert message["content"] == [{"type": "text", "text": "it is 1234"}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", NAME)
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["id"].startswith("msg_")
    assert reply.headers["request-id"].startswith("req_")
    assert message["kveraser"]["exact"] is True


def test_calls_are_blocks_and_results_go_back_by_their_ids(serve, say):
    server = serve()
    say(f"I look.\n{DOOR}\n{CAR}", "it is 1234")
    message = good(post(server, tools=[LOOK]))
    text, door, car = message["content"]
    assert text == {"type": "text", "text": "I look."}
    assert (door["type"], door["name"], door["input"], car["input"]) == ("tool_use", "look", {"what": "the door"}, {"what": "the car"})  # fmt: skip
    assert message["stop_reason"] == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": door["id"], "content": "1234"},
               {"type": "tool_result", "tool_use_id": car["id"], "content": [{"type": "text", "text": "blue"}], "is_error": False},
               {"type": "text", "text": "so?"}]  # fmt: skip
    talk = [*ASK, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": results}]
    after = good(post(server, talk, tools=[LOOK]))
    assert after["content"][0]["text"] == "it is 1234"
    first, second = message["usage"], after["usage"]
    read = first["input_tokens"] + first["cache_read_input_tokens"] + first["output_tokens"]
    assert second["cache_read_input_tokens"] >= read - 2
    assert (
        second["input_tokens"] + second["cache_read_input_tokens"] == count(server, talk, tools=[LOOK])["input_tokens"]
    )


def test_both_apis_share_what_is_cached(serve, say):
    server = serve()
    say("yes")
    plain = {"model": NAME, "max_tokens": 5, "temperature": 0}
    good(
        server.call(
            "POST", "/v1/chat/completions", json={**plain, "messages": [{"role": "system", "content": "be kind"}, *ASK]}
        )
    )
    usage = good(post(server, system="be kind"))["usage"]
    assert usage["input_tokens"] == 1


SAID = [f"I look.\n{DOOR}\n{CAR}\nso", "just this", DOOR, "<tool_call>{}</tool_call> no",
        f"<think>\nlet me see\n</think>\n\nI look.\n{DOOR}", "<think>on and on", "", "a stop b"]  # fmt: skip


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("options", [{}, {"max_tokens": 25}, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}])  # fmt: skip
def test_streaming_equals_not_streaming(serve, say, said, options):
    server = serve()
    say(said)
    options = {"tools": [LOOK], "stop_sequences": ["stop"], **options}
    events = events_of(post(server, stream=True, **options).text)
    assert comparable(put_together(events)) == comparable(good(post(server, **options)))
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("ping") == (1 if "content_block_start" in kinds else 0)


PIECES = st.lists(
    st.one_of(
        st.builds(TextPiece, st.text(min_size=1, max_size=3)), st.builds(ThinkingPiece, st.text(min_size=1, max_size=3)),
        st.builds(CallPiece, st.sampled_from(["a", "b"]), st.sampled_from(["{}", '{"x": 1}'])),
    ), max_size=8)  # fmt: skip


@given(PIECES)
def test_blocks_are_begun_filled_and_ended_in_order(pieces):
    blocks = BlockEvents()
    events = [event for piece in pieces for event in blocks.push([piece])] + list(blocks.close())
    assert events == [] or events[1] == {"type": "ping"}
    opened, at = None, -1
    for event in [event for event in events if event["type"] != "ping"]:
        if event["type"] == "content_block_start":
            assert opened is None
            opened, at = event["content_block"]["type"], at + 1
        else:
            assert opened is not None
            if event["type"] == "content_block_stop":
                opened = None
        assert event["index"] == at
    assert opened is None


def test_why_a_reply_ended_is_told(serve, say):
    server = serve()
    say("one two three")
    ended = good(post(server, stop_sequences=["three", "two"]))
    assert (ended["stop_reason"], ended["stop_sequence"], ended["content"][0]["text"]) == (
        "stop_sequence",
        "two",
        "one ",
    )
    assert good(post(server, max_tokens=2))["stop_reason"] == "max_tokens"
    say("it goes on " * 4000)
    assert good(post(serve(cache_budget=1 << 18), max_tokens=60_000))["stop_reason"] == "model_context_window_exceeded"


def test_a_reply_that_was_begun_is_continued(serve, say):
    server = serve()
    say(" 1234")
    begun = [*ASK, {"role": "assistant", "content": "the code is"}]
    assert good(post(server, begun))["content"] == [{"type": "text", "text": " 1234"}]
    assert post(server, [*ASK, {"role": "assistant", "content": "the code is "}]).status_code == 400
    assert post(server, [{"role": "assistant", "content": "the"}]).status_code == 400


def test_a_tool_can_be_forced_or_forbidden(serve, say):
    server = serve()
    say(' {"what": "it"}}\n</tool_call>')
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
        message = good(post(server, tools=[LOOK], tool_choice=choice))
        assert message["content"][0]["input"] == {"what": "it"}
    say(DOOR)
    assert good(post(server, tools=[LOOK], tool_choice={"type": "none"}))["content"] == [{"type": "text", "text": DOOR}]


def turns(*thoughts):
    """A conversation with thinking."""
    talk = []
    for number, thought in enumerate(thoughts):
        talk.append({"role": "user", "content": f"question {number}"})
        blocks = [{"type": "thinking", "thinking": thought, "signature": "x"}] if thought else []
        talk.append({"role": "assistant", "content": [*blocks, {"type": "text", "text": "the answer"}]})
    return [*talk, {"role": "user", "content": "and now?"}]


def test_thinking_is_shown_where_the_template_shows_it(serve):
    server = serve()
    assert count(server, turns("a long thought", None)) == count(server, turns(None, None)), "an earlier turn"
    assert count(server, turns(None, "a long thought")) != count(server, turns(None, None)), "the last turn"
    hidden = [
        *ASK,
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "xyz"}, {"type": "text", "text": "a"}]},
        *ASK,
    ]
    assert count(server, hidden) == count(server, [*ASK, {"role": "assistant", "content": "a"}, *ASK])


def test_an_error_of_a_tool_is_told_to_the_model_once(serve):
    server = serve()

    def tokens(content, is_error):
        use = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": content, "is_error": is_error}
        return count(server, [*ASK, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}])

    assert tokens("no door", True) == tokens("Error: no door", False) == tokens("Error: no door", True)
    assert tokens(None, True) == tokens("Error", None)


MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def test_marks_of_a_cache_and_notes_change_nothing(serve, say):
    say("yes")
    server = serve()
    block = {"type": "text", "text": "what is the code of the door?"}
    marked = post(server, [{"role": "user", "content": [{**block, **MARK}]}], system=[{"type": "text", "text": "kind", **MARK}],
                  tools=[{**LOOK, **MARK, "strict": True}], metadata={"user_id": "me"}, service_tier="auto", **MARK)  # fmt: skip
    plain = post(server, system="kind", tools=[LOOK])
    assert good(marked)["content"] == good(plain)["content"]
    assert plain.json()["usage"]["input_tokens"] == 1


USE = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
REFUSED = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"n": 2}, "n: is not served"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**LOOK, "input_schema": {"type": 5}}]}, "tools[0].input_schema"),
    ({"tools": [LOOK, LOOK]}, "tools"),
    ({"tool_choice": {"type": "tool", "name": "fly"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"talk": []}, "messages"),
    ({"talk": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ({"talk": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"talk": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"talk": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]"),
    ({"talk": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "5"}]}]}, "messages[0].content[0].tool_use_id: there is no call 'x'"),
    ({"talk": [*ASK, {"role": "assistant", "content": [USE]}]}, "messages[1]"),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits[0]"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919", "keep": {"type": "turns", "value": 1}}]}}, "keep"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_is_not_served_is_refused_by_its_place(serve, changes, said):
    reply = post(serve(), **changes)
    error = reply.json()
    assert (reply.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error"), (
        reply.text
    )
    assert said in error["error"]["message"]
    assert error["request_id"] == reply.headers["request-id"]


def test_errors_have_the_types_and_statuses_of_anthropic(serve, monkeypatch):
    server = serve(keys=("alpha", "beta"), queue_size=1, body_limit=3000)

    def kind(reply):
        return reply.status_code, reply.json()["error"]["type"]

    assert kind(post(server)) == (401, "authentication_error")
    assert kind(post(server, key="gamma")) == (401, "authentication_error")
    assert kind(post(server, key="alpha", model="other")) == (404, "not_found_error")
    assert kind(post(server, [{"role": "user", "content": "a" * 4000}], key="alpha")) == (413, "request_too_large")
    assert server.call("GET", "/v1/messages", "alpha").json()["error"]["type"] == "invalid_request_error"
    assert post(serve(timeout=0.05), max_tokens=5000).status_code == 504
    gate = threading.Event()
    server.service.submit(lambda job: gate.wait(10))
    while server.service.worker.waiting:
        time.sleep(0.001)
    waiting = server.service.submit(lambda job: None)
    full = post(server, key="alpha")
    gate.set()
    waiting.future.result(10)  # its place in the queue is free again
    assert kind(full) == (529, "overloaded_error")
    assert int(full.headers["retry-after"]) >= 1

    def fail(*_):
        raise RuntimeError("what is the code of the door?")

    monkeypatch.setattr(server.service, "complete", fail)
    broken = post(server, key="alpha")
    assert kind(broken) == (500, "api_error")
    assert "door" not in broken.text


def test_an_error_in_a_stream_is_an_event(serve, monkeypatch):
    server = serve()

    def breaks(self, logits):
        if self.token >= 0:
            raise RuntimeError("secret")
        self.token = 5
        return Delta("so far ", sampled=1)

    monkeypatch.setattr(Decoding, "draw", breaks)
    *_, last = events_of(post(server, stream=True).text)
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"


def test_the_key_may_come_as_anthropics_clients_send_it(serve, say):
    say("yes")
    server = serve(keys=("alpha", "beta"))
    body = {"model": NAME, "messages": ASK, "max_tokens": 5}

    def send(**headers):
        return server.call("POST", "/v1/messages", json=body, headers=headers)

    assert good(send(**{"x-api-key": "alpha"}))["usage"]["cache_read_input_tokens"] == 0
    assert good(send(authorization="Bearer beta"))["usage"]["cache_read_input_tokens"] == 0, (
        "nothing of the other key's"
    )
    assert good(send(authorization="Bearer alpha"))["usage"]["cache_read_input_tokens"] > 0
    talk = {"model": NAME, "messages": ASK, "max_tokens": 5}
    shared = server.call("POST", "/v1/chat/completions", json=talk, headers={"x-api-key": "beta"})
    assert good(shared)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert send(**{"x-api-key": "gamma"}).status_code == 401
    assert send(**{"x-api-key": ""}).status_code == 401


def test_a_client_that_goes_away_frees_the_model(say):
    say("and so on " * 2000)
    with running(tiny_service(tool_tokenizer(), cache_budget=1 << 24)) as url:
        body = {"model": NAME, "messages": ASK, "max_tokens": 8000}
        with httpx.stream("POST", f"{url}/v1/messages", json={**body, "stream": True}) as reply:
            assert next(reply.iter_lines()) == "event: message_start"
        started = time.monotonic()
        assert httpx.post(f"{url}/v1/messages", json={**body, "max_tokens": 2}).status_code == 200
        assert time.monotonic() - started < 5


def test_a_model_without_tools_in_its_template_says_so():
    with servers() as make:
        reply = post(make(), tools=[LOOK])
        assert reply.status_code == 400
        assert "does not show tools" in reply.json()["error"]["message"]
