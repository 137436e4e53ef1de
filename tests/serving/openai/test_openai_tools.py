"""Tools in chat completions: rendered, called, streamed, refused."""

from __future__ import annotations

import json

import pytest
from serving_helpers import NAME, event_list, servers, tool_tokenizer

ASK = [{"role": "user", "content": "what is the code of the door?"}]
LOOK = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {
    "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}  # fmt: skip
OPEN = {"type": "function", "function": {"name": "open"}}
DOOR = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'
CAR = '<tool_call>\n{"name": "look", "arguments": {"what": "the car"}}\n</tool_call>'


@pytest.fixture
def server():
    with servers() as make:
        yield make(tokenizer=tool_tokenizer())


def post(server, talk=ASK, **changes):
    body = {"model": NAME, "messages": talk, "max_tokens": 300, "temperature": 0, "tools": [LOOK, OPEN], **changes}
    return server.call("POST", "/v1/chat/completions", json=body)


def choice(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_calls_are_told_as_openai_does(server, say):
    say(f"I look.\n{DOOR}\n{CAR}")
    reply = post(server)
    assert choice(reply)["finish_reason"] == "tool_calls"
    message = choice(reply)["message"]
    assert message["content"] == "I look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "look", "arguments": '{"what": "the door"}'}, {"name": "look", "arguments": '{"what": "the car"}'}]  # fmt: skip
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert reply.json()["kveraser"]["malformed_calls"] == []
    say(DOOR)
    assert choice(post(server))["message"]["content"] is None


def gathered(chunks):
    """A streamed reply put together as clients do."""
    text, calls, ends = "", {}, []
    for chunk in chunks:
        for part in chunk["choices"]:
            text += part["delta"].get("content") or ""
            for call in part["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls), "every call begins with its id, in order"
                    calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
            ends += [part["finish_reason"]] if part["finish_reason"] else []
    return text, list(calls.values()), ends


@pytest.mark.parametrize("said", [DOOR, f"I look.\n{DOOR}\n{CAR}\n so", "no call", "<tool_call>{}</tool_call> no", '<tool_call>{"na'])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"parallel_tool_calls": False}, {"logprobs": True}, {"max_tokens": 30}])
def test_streaming_equals_not_streaming(server, say, said, options):
    say(said)
    plain, streamed = post(server, **options), post(server, **options, stream=True, stream_options={"include_usage": True})  # fmt: skip
    chunks = event_list(streamed.text)
    text, calls, ends = gathered(chunks)
    message = choice(plain)["message"]
    assert text == (message["content"] or "")
    assert calls == [call["function"] for call in message.get("tool_calls", ())]
    assert ends == [choice(plain)["finish_reason"]]
    assert chunks[-1]["usage"]["completion_tokens"] == plain.json()["usage"]["completion_tokens"]
    assert chunks[-1]["kveraser"]["malformed_calls"] == plain.json()["kveraser"]["malformed_calls"]
    if options.get("logprobs"):
        shown = [
            entry for c in chunks for part in c["choices"] if part["logprobs"] for entry in part["logprobs"]["content"]
        ]
        assert shown == choice(plain)["logprobs"]["content"]


def test_a_call_that_is_not_right_is_text_and_is_flagged(server, say):
    wrong = '<tool_call>{"name": "look", "arguments": {"what": 5}}</tool_call>'
    say(f"{wrong}\n{DOOR}")
    reply = post(server)
    assert choice(reply)["message"]["content"] == wrong
    assert len(choice(reply)["message"]["tool_calls"]) == 1
    (problem,) = reply.json()["kveraser"]["malformed_calls"]
    assert "what" in problem


def test_without_parallel_calls_the_model_stops_after_the_first(server, say):
    say(f"{DOOR}\n{CAR} and so on, and so on, and so on")
    reply = post(server, parallel_tool_calls=False)
    assert len(choice(reply)["message"]["tool_calls"]) == 1
    assert reply.json()["usage"]["completion_tokens"] == len(tool_tokenizer().encode(DOOR, add_special_tokens=False))


def test_a_call_can_be_forced_of_any_tool_or_of_one(server, say):
    say(' "the door"}}\n</tool_call>'.replace(' "', ' {"what": "'))
    named = post(server, tool_choice={"type": "function", "function": {"name": "look"}})
    assert choice(named)["message"]["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": '{"what": "the door"}',
    }
    say(' "look", "arguments": {"what": "the door"}}\n</tool_call>')
    assert choice(post(server, tool_choice="required"))["message"]["tool_calls"][0]["function"]["name"] == "look"
    say(' {"what": "the door"}}\n</tool_call>')
    assert choice(post(server, tool_choice="required", tools=[LOOK]))["message"]["tool_calls"]
    say(DOOR)
    assert choice(post(server, tool_choice="none"))["message"]["content"] == DOOR


def test_the_next_turn_continues_what_is_cached(server, say):
    say(f"I look.\n{DOOR}", "it is 1234")
    first = post(server).json()
    call = first["choices"][0]["message"]
    talk = [*ASK, call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "the code is 1234"}]
    second = post(server, talk)
    assert choice(second)["message"]["content"] == "it is 1234"
    cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 2


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 5}}}]}),
        ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": "http://127.0.0.1/"}}}]}),
        ("tools", {"tools": [OPEN, OPEN]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "fly"}}}),
        ("tool_choice", {"tools": None, "tool_choice": "required"}),
        ("tool_choice", {"tools": [], "tool_choice": "auto"}),
        ("messages[1]", {"talk": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "5"}]}),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_its_place(server, param, changes):
    reply = post(server, **changes)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_a_model_whose_template_has_no_tools_says_so():
    with servers() as make:
        reply = post(make())
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "tools_not_supported", "tools")
        assert "does not show tools" in error["message"]


def test_arguments_reach_the_template_as_an_object_and_what_is_none_as_it_is(server, say):
    say("yes")

    def tokens(arguments):
        call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
        return post(server, [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]).json()["usage"][
            "prompt_tokens"
        ]

    assert tokens(json.dumps({"what": "it"})) == tokens('{"what":   "it"}') < tokens('["what", "it", "it"]') + 8
    assert post(server, [*ASK, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
        "name": "look", "arguments": "{"}}]}]).status_code == 200  # fmt: skip
