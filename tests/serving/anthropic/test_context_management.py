"""What the server clears by itself: which results and thinking, and what that costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_helpers import NAME, servers, tool_tokenizer

from kveraser.serving.anthropic.context_edits import old_thinking, old_tool_uses
from kveraser.serving.anthropic.protocol import ClearThinking, ClearToolUses
from kveraser.serving.chat.messages import Call, ChatMessage

TOOL = {"name": "look", "input_schema": {"type": "object"}}
TYPE = "clear_tool_uses_20250919"


def edit(**changes):
    return {"type": TYPE, "trigger": {"type": "tool_uses", "value": 2}, "keep": {"type": "tool_uses", "value": 1}, **changes}  # fmt: skip


def loop(count, names=("look",)):
    """An agent's conversation with so many calls."""
    talk = [{"role": "user", "content": "what is behind the doors?"}]
    for number in range(count):
        use = {
            "type": "tool_use",
            "id": f"call{number}",
            "name": names[number % len(names)],
            "input": {"door": f"number {number} of the list"},
        }
        result = {
            "type": "tool_result",
            "tool_use_id": f"call{number}",
            "content": f"the door number {number}: the code of it is {number * 37} and the car is fast.",
        }
        talk += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return talk  # fmt: skip


@pytest.fixture
def server(say):
    say("so it is")
    with servers() as make:
        yield make(tokenizer=tool_tokenizer(), policy="kveraser")


def post(server, talk, *edits, path="/v1/messages", **changes):
    body = {"model": NAME, "messages": talk, "tools": [TOOL, {**TOOL, "name": "other"}], **changes}
    if edits:
        body["context_management"] = {"edits": list(edits)}
    if path == "/v1/messages":
        body |= {"max_tokens": 20, "temperature": 0}
    reply = server.call("POST", path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_old_results_are_erased_from_the_cached_conversation(server):
    before = post(server, loop(4))
    after = post(server, loop(4), edit())
    (applied,) = after["context_management"]["applied_edits"]
    assert (applied["type"], applied["cleared_tool_uses"]) == (TYPE, 3)
    assert len(after["kveraser"]["spans"]) == 3
    assert after["kveraser"]["method"] == "kveraser"
    total = sum(after["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))
    assert applied["cleared_input_tokens"] == sum(b - a for a, b in after["kveraser"]["spans"]) > 60
    assert total == before["usage"]["input_tokens"] - applied["cleared_input_tokens"]
    assert after["usage"]["input_tokens"] < 5, "nothing else is read again"


def test_each_turn_clears_one_more_and_keeps_the_rest(server):
    keep_two = edit(keep={"type": "tool_uses", "value": 2})
    post(server, loop(4), keep_two)
    following = post(server, loop(5), keep_two)
    assert following["context_management"]["applied_edits"][0]["cleared_tool_uses"] == 3
    assert len(following["kveraser"]["spans"]) == 1, "the others are gone already"
    new = post(server, loop(5), path="/v1/messages/count_tokens")["input_tokens"] - post(server, loop(4), path="/v1/messages/count_tokens")["input_tokens"]  # fmt: skip
    assert following["usage"]["input_tokens"] <= new


def test_under_exact_the_reply_is_that_of_a_fresh_prefill(server):
    exact = {"kveraser": {"policy": "exact"}}
    post(server, loop(4), **exact)
    edited = post(server, loop(4), edit(), **exact)
    assert edited["kveraser"]["exact"] is True
    with servers() as make:
        fresh = post(make(tokenizer=tool_tokenizer()), loop(4), edit())
    assert fresh["content"] == edited["content"]
    assert fresh["usage"]["input_tokens"] == sum(edited["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))  # fmt: skip


def test_nothing_is_cleared_before_its_time(server):
    assert post(server, loop(2), edit())["context_management"] == {"applied_edits": []}
    assert post(server, loop(4), edit(clear_at_least={"type": "input_tokens", "value": 5000}))["context_management"] == {"applied_edits": []}  # fmt: skip
    assert post(server, loop(4), {"type": TYPE})["context_management"] == {"applied_edits": []}
    assert "context_management" not in post(server, loop(4))
    few = edit(trigger={"type": "input_tokens", "value": 100})
    assert post(server, loop(2), few)["context_management"]["applied_edits"][0]["cleared_tool_uses"] == 1


def test_counting_tokens_tells_both_numbers(server):
    plain = post(server, loop(4), path="/v1/messages/count_tokens")
    counted = post(server, loop(4), edit(), path="/v1/messages/count_tokens")
    assert "context_management" not in plain
    assert counted["context_management"]["original_input_tokens"] == plain["input_tokens"]
    applied = post(server, loop(4), edit())["context_management"]["applied_edits"][0]
    assert counted["input_tokens"] == plain["input_tokens"] - applied["cleared_input_tokens"]


def test_inputs_are_cleared_only_where_that_is_asked_for(server):
    def cleared(**options):
        return post(server, loop(4, ("look", "other")), edit(**options))["context_management"]["applied_edits"][0]["cleared_input_tokens"]  # fmt: skip

    results, one, both = cleared(), cleared(clear_tool_inputs=["other"]), cleared(clear_tool_inputs=True)
    assert results < one < both
    assert cleared(exclude_tools=["other"]) < results


def test_old_thinking_is_cleared(server):
    talk = [*loop(1), {"role": "assistant", "content": [{"type": "thinking", "thinking": "what now?", "signature": ""}, {"type": "text", "text": "a"}]},
            {"role": "user", "content": "b"}]  # fmt: skip
    thoughts = {"type": "clear_thinking_20251015"}
    assert post(server, talk, thoughts)["context_management"] == {"applied_edits": []}
    talk[1]["content"].insert(0, {"type": "thinking", "thinking": "a plan", "signature": ""})
    (applied,) = post(server, talk, thoughts)["context_management"]["applied_edits"]
    assert applied == {"type": thoughts["type"], "cleared_thinking_turns": 1, "cleared_input_tokens": 0}, "the template hid it"  # fmt: skip
    assert post(server, talk, {**thoughts, "keep": "all"})["context_management"] == {"applied_edits": []}
    assert post(server, talk, {**thoughts, "keep": {"type": "thinking_turns", "value": 2}})["context_management"] == {"applied_edits": []}  # fmt: skip


def conversation(named):
    talk = []
    for number, name in enumerate(named):
        talk += [ChatMessage("assistant", calls=(Call(f"c{number}", name, {}),), reasoning="x" if number % 2 else None),
                 ChatMessage("tool", "r", call_id=f"c{number}")]  # fmt: skip
    return talk


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(0, 5), st.integers(0, 8), st.booleans())
def test_the_newest_calls_and_those_that_are_excluded_always_stay(named, keep, trigger, excluded):
    asked = ClearToolUses.model_validate(
        edit(keep={"type": "tool_uses", "value": keep}, trigger={"type": "tool_uses", "value": trigger},
             exclude_tools=["b"] if excluded else None))  # fmt: skip
    cleared, count = old_tool_uses(conversation(named), asked, 0)
    assert count == len(cleared.results)
    if len(named) <= trigger:
        assert count == 0
    else:
        old = [at for at in range(max(len(named) - keep, 0)) if not (excluded and named[at] == "b")]
        assert cleared.results == {2 * at + 1 for at in old}


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 5))
def test_the_newest_thinking_stays(named, keep):
    talk = conversation(named)
    asked = ClearThinking.model_validate({"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": keep}})  # fmt: skip
    thought = [index for index, message in enumerate(talk) if message.reasoning]
    assert sorted(old_thinking(talk, asked)) == thought[: max(len(thought) - keep, 0)]
