"""Clients edit what they send: a time in the system prompt, cleared results, thoughts that the template drops; over both APIs."""

from __future__ import annotations

import pytest
from serving_helpers import NAME, servers, tool_tokenizer

SYSTEM = "It is {time} now. you are kind, the car is blue and the door is fast, and all of it is in the list."
RESULTS = [f"the door {n}: the code of it is {n * 37}, the color is blue, it is fast and it is kind" for n in range(4)]
THOUGHT = "it may be the car, so I look at the list"
ANSWER = "so the code of the door is 1234, the color of the car is blue and it is fast, but what else is in the list I do not know"
ANSWER = f"{ANSWER}; {ANSWER}"


def openai(talk):
    """A conversation as a chat completion asks for it."""
    messages = []
    for index, (role, text) in enumerate(talk):
        if role == "tool":
            call = {"id": f"c{index}", "type": "function", "function": {"name": "look", "arguments": '{"door": "all"}'}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{index}", "content": text})
        else:
            messages.append({"role": role, "content": text})
    function = {"name": "look", "parameters": {"type": "object"}}
    return "/v1/chat/completions", {"messages": messages, "tools": [{"type": "function", "function": function}]}


def anthropic(talk):
    """The same as a message asks for it."""
    messages = []
    for index, (role, text) in enumerate(talk[1:]):
        if role == "tool":
            use = {"type": "tool_use", "id": f"c{index}", "name": "look", "input": {"door": "all"}}
            result = {"type": "tool_result", "tool_use_id": f"c{index}", "content": text}
            messages += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        else:
            messages.append({"role": role, "content": text})
    return "/v1/messages", {"system": talk[0][1], "messages": messages,
                            "tools": [{"name": "look", "input_schema": {"type": "object"}}]}  # fmt: skip


APIS = pytest.mark.parametrize("api", [openai, anthropic])


def conversation(time="10:41", results=RESULTS, more=()):
    asked = [("user", "what is the code of the doors?"), *(("tool", result) for result in results)]
    return [("system", SYSTEM.format(time=time)), *asked, *more]


def send(server, api, talk, policy="kveraser", **changes):
    path, body = api(talk)
    wishes = {"policy": policy, **changes.pop("kveraser", {})}
    more = {"model": NAME, "max_tokens": 8, "temperature": 0, "kveraser": wishes, **changes}
    reply = server.call("POST", path, json={**body, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply):
    """What a reply says."""
    if "choices" in reply:
        return reply["choices"][0]["message"]["content"]
    return "".join(block.get("text", "") for block in reply["content"])


@pytest.fixture
def make():
    with servers() as made:
        yield lambda **options: made(tokenizer=tool_tokenizer(), **options)


def fresh(make, api, talk):
    return text_of(send(make(), api, talk, "exact"))


EDITS = {
    "a longer time": (conversation("10:41:33"), 1),
    "two cleared results": (conversation(results=["[Old tool result content cleared]", "", *RESULTS[2:]]), 2),
    "all of it": (conversation("11:02", ["[cleared]", RESULTS[1].replace("blue", "red"), "[cleared]", RESULTS[3]]), 4),
}


@APIS
@pytest.mark.parametrize("kind", list(EDITS))
def test_what_a_client_has_changed_is_changed_in_place_and_all_else_is_kept(make, api, kind):
    server = make()
    talk, count = EDITS[kind]
    send(server, api, conversation())
    told = send(server, api, talk)["kveraser"]
    assert (told["method"], told["reason"], told["exact"]) == ("kveraser", "changed", False)
    assert len(told["spans"]) == len(told["replacements"]) == count
    assert told["tokens_recomputed"] <= sum(told["replacements"]) + sum(b - a for a, b in told["spans"]) + 5
    again = send(server, api, talk)["kveraser"]
    assert (again["method"], again["reason"], again["exact"]) == ("prefix", "continued", False)
    exact = send(server, api, talk, "exact")
    assert exact["kveraser"]["exact"]
    assert text_of(exact) == fresh(make, api, talk)


@APIS
def test_under_exact_an_edited_request_is_answered_as_by_a_server_that_knows_nothing(make, api):
    server = make()
    talk = EDITS["all of it"][0]
    send(server, api, conversation(), "exact")
    for asked in (talk, [*talk, *(("assistant", ANSWER), ("user", "and the car?"))]):
        reply = send(server, api, asked, "exact")
        assert (reply["kveraser"]["exact"], reply["kveraser"]["residual"]) == (True, 0.0)
        assert text_of(reply) == fresh(make, api, asked)


@APIS
def test_a_thought_that_the_template_drops_is_taken_out_and_what_was_said_after_it_is_kept(make, api, say, monkeypatch):
    server = make()
    say(f"<think>\n{THOUGHT}\n</think>\n{ANSWER}")
    send(server, api, conversation(), max_tokens=400)
    monkeypatch.undo()
    later = conversation(more=[("assistant", ANSWER), ("user", "and the car?")])
    told = send(server, api, later)["kveraser"]
    assert (told["method"], told["replacements"]) == ("kveraser", [0])
    (start, end), = told["spans"]  # fmt: skip
    assert end - start >= len(tool_tokenizer().encode(THOUGHT))
    assert told["tokens_recomputed"] < end - start + 40, "the thought and the new message"
    exact = send(server, api, later, "exact")
    assert text_of(exact) == fresh(make, api, later)


def test_a_time_a_cleared_result_and_a_thought_are_seen_in_one_request(make, say, monkeypatch):
    server = make()
    say(f"<think>\n{THOUGHT}\n</think>\n{ANSWER}")
    send(server, anthropic, conversation(), max_tokens=400)
    monkeypatch.undo()
    later = conversation("11:02", ["[old]", *RESULTS[1:]], [("assistant", ANSWER), ("user", "and the car?")])
    told = send(server, anthropic, later)["kveraser"]
    assert (told["method"], told["reason"], len(told["spans"])) == ("kveraser", "changed", 3)
    assert told["replacements"][-1] == 0
    assert text_of(send(server, anthropic, later, "exact")) == fresh(make, anthropic, later)


@APIS
def test_where_too_little_would_be_saved_it_is_read_anew_and_said_so(make, api):
    server = make()
    send(server, api, conversation(results=["x", "so"]))
    other = conversation(results=["by 1, all that was new came from 99 other places! " * 40, "so"])
    reply = send(server, api, other)
    told = reply["kveraser"]
    assert (told["reason"], told["exact"]) == ("too little saved", True)
    assert text_of(reply) == fresh(make, api, other)


@APIS
def test_a_branch_with_a_change_leaves_the_conversation_that_it_parts_from_as_it_is(make, api):
    server = make()
    send(server, api, conversation())
    branch = conversation("11:02", RESULTS[:2])
    assert send(server, api, branch)["kveraser"]["method"] == "kveraser"
    back = send(server, api, conversation(), "exact")["kveraser"]
    assert (back["method"], back["exact"]) == ("prefix", True)
    assert back["tokens_recomputed"] == 1


@APIS
def test_auto_recomputes_at_once_what_leaves_more_behind_than_it_may(make, api):
    talk = conversation("11:02")
    for limit, method in ((0.0, "full-recompute"), (None, "kveraser")):
        server = make()
        send(server, api, conversation())
        reply = send(server, api, talk, "auto", kveraser={"max_residual": limit})
        told = reply["kveraser"]
        assert told["method"] == method
        if limit is not None:  # an eraser that scores nothing cannot tell that it is less
            assert (told["reason"], told["exact"], told["residual"]) == ("residual too large", True, 0.0)
            assert text_of(reply) == fresh(make, api, talk)


def test_a_limit_of_the_server_holds_for_requests_that_name_none(make):
    server = make(policy="auto", max_residual=0.0)
    send(server, openai, conversation(), None)
    told = send(server, openai, conversation("11:02"), None)["kveraser"]
    assert told["reason"] == "residual too large"
    assert send(server, openai, conversation("11:03"), "kveraser")["kveraser"]["reason"] == "changed"


@APIS
def test_wishes_that_cannot_be_met_are_refused_by_their_name(make, api):
    server = make()
    path, body = api(conversation())
    for wishes, param in (
        ({"policy": "kveraser", "max_residual": 0.1}, "kveraser.max_residual"),
        ({"policy": "auto", "max_residual": 1.5}, "kveraser.max_residual"),
        ({"must_forget": [""]}, "kveraser.must_forget[0]"),
        ({"must_forget": "the code"}, "kveraser.must_forget"),
        ({"must_forget": ["nowhere", "you are kind"]}, "kveraser.must_forget[1]"),
        ({"forget": True}, "kveraser.forget"),
    ):
        reply = server.call("POST", path, json={**body, "model": NAME, "max_tokens": 8, "kveraser": wishes})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith(param)
