"""OpenAI's own client with tools, unchanged, against a server on loopback: `make test-clients`."""

from __future__ import annotations

import json

import openai
import pytest
from serving_helpers import NAME, running, tiny_service, tool_tokenizer

ASK = [{"role": "user", "content": "what is the code of the door?"}]
LOOK = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {
    "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}  # fmt: skip
DOOR = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client():
    with running(tiny_service(tool_tokenizer(), cache_budget=1 << 24, policy="kveraser"), "alpha") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="alpha", max_retries=0)


def ask(client, talk, **options):
    return client.chat.completions.create(model=NAME, messages=talk, tools=[LOOK], max_tokens=300, **options)


def test_an_agents_loop_runs_to_its_end_and_pays_only_for_what_is_new(client, say):
    say(DOOR, DOOR, "it is 1234")
    talk, read = list(ASK), []
    for number in range(3):
        reply = ask(client, talk)
        message = reply.choices[0].message
        read.append(reply.usage.prompt_tokens - reply.usage.prompt_tokens_details.cached_tokens)
        talk.append(message)
        for call in message.tool_calls or ():
            assert json.loads(call.function.arguments) == {"what": "the door"}
            talk.append({"role": "tool", "tool_call_id": call.id, "content": f"the code is {number}"})
    assert message.content == "it is 1234"
    assert max(read[1:]) < read[0] / 2


def test_a_stream_is_put_together_by_the_client(client, say):
    say(f"I look.\n{DOOR}")
    with client.chat.completions.stream(model=NAME, messages=ASK, tools=[LOOK], max_tokens=300) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [event.arguments for event in done] == ['{"what": "the door"}']
    assert (message.content, message.tool_calls[0].function.name) == ("I look.", "look")
    assert ask(client, ASK).choices[0].message.content == "I look."


def test_a_tool_is_forced_by_its_name(client, say):
    say(' {"what": "it"}}\n</tool_call>')
    reply = ask(client, ASK, tool_choice={"type": "function", "function": {"name": "look"}})
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.tool_calls[0].function.arguments == '{"what": "it"}'


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, [*ASK, {"role": "tool", "tool_call_id": "x", "content": "5"}])
    assert found.value.param == "messages[1]"
