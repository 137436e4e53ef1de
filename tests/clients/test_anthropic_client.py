"""Anthropic's own client, unchanged, against a server on loopback: `make test-clients`."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import anthropic
import pytest
from serving_helpers import NAME, running, tiny_service, tool_tokenizer

README = Path(__file__).parents[2] / "README.md"
ASK = [{"role": "user", "content": "what is the code of the door?"}]
LOOK = {
    "name": "look",
    "description": "looks",
    "input_schema": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
}
DOOR = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'


@pytest.fixture(scope="module")
def url():
    with running(tiny_service(tool_tokenizer(), cache_budget=1 << 24, policy="kveraser"), "alpha") as address:
        yield address


@pytest.fixture
def client(url):
    return anthropic.Anthropic(base_url=url, api_key="alpha", max_retries=0)


def test_a_message_and_its_usage(client, say):
    say("it is 1234")
    message = client.messages.create(model=NAME, max_tokens=50, system="be kind", messages=ASK)
    assert message.content[0].text == "it is 1234"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message.kveraser["exact"] is True
    assert message._request_id.startswith("req_")
    counted = client.messages.count_tokens(model=NAME, system="be kind", messages=ASK)
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    bearer = anthropic.Anthropic(base_url=client.base_url, api_key=None, auth_token="alpha")
    assert bearer.messages.create(model=NAME, max_tokens=5, messages=ASK).usage.output_tokens


def test_a_stream_is_put_together_by_the_client(client, say):
    say(f"I look.\n{DOOR}")
    with client.messages.stream(model=NAME, max_tokens=300, messages=ASK, tools=[LOOK]) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "I look."
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].input == {"what": "the door"}
    assert message.stop_reason == "tool_use"
    plain = client.messages.create(model=NAME, max_tokens=300, messages=ASK, tools=[LOOK])
    assert plain.content[1].input == message.content[1].input
    assert plain.usage.output_tokens == message.usage.output_tokens


def test_an_agents_loop_with_results_cleared_by_the_server(client, say):
    say(DOOR, DOOR, DOOR, DOOR, "it is 1234")
    talk, cleared, last = list(ASK), [], None
    edits = [{"type": "clear_tool_uses_20250919", "trigger": {"type": "tool_uses", "value": 2},
              "keep": {"type": "tool_uses", "value": 1}}]  # fmt: skip
    for number in range(5):
        last = client.beta.messages.create(
            model=NAME, max_tokens=300, messages=talk, tools=[LOOK], betas=["context-management-2025-06-27"],
            context_management={"edits": edits},
        )  # fmt: skip
        cleared.append(sum(edit.cleared_tool_uses for edit in last.context_management.applied_edits))
        talk.append({"role": "assistant", "content": last.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": f"result {number}: the code is {number * 37}"}
            for block in last.content
            if block.type == "tool_use"
        ]
        talk.append({"role": "user", "content": results or "thanks"})
    assert cleared == [0, 0, 0, 2, 3]
    assert last.content[0].text == "it is 1234"
    assert last.kveraser["method"] == "kveraser"
    assert len(last.kveraser["spans"]) == 1


def test_the_clients_own_loop_over_tools_runs_to_its_end(client, say):
    say(DOOR, "it is 1234")
    seen = []

    @anthropic.beta_tool
    def look(what: str) -> str:
        """Looks.

        Args:
            what: to look at.
        """
        seen.append(what)
        return "the code is 1234"

    runner = client.beta.messages.tool_runner(model=NAME, max_tokens=300, messages=ASK, tools=[look])
    assert runner.until_done().content[0].text == "it is 1234"
    assert seen == ["the door"]


def test_errors_are_the_clients_own(client, url):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.create(model=NAME, max_tokens=5, messages=[])
    with pytest.raises(anthropic.AuthenticationError) as found:
        anthropic.Anthropic(base_url=url, api_key="beta").messages.create(model=NAME, max_tokens=5, messages=ASK)
    assert found.value.body["error"]["type"] == "authentication_error"


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).type == "model"


def test_the_asynchronous_client_gets_the_same(url, say):
    say("it is 1234")

    async def go():
        async with anthropic.AsyncAnthropic(base_url=url, api_key="alpha") as client:
            stream = await client.messages.create(model=NAME, max_tokens=50, messages=ASK, stream=True)
            return [event async for event in stream]

    events = asyncio.run(go())
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == "it is 1234"
    assert json.loads(events[-2].to_json())["kveraser"]["method"] in ("prefill", "prefix")


def test_what_the_readme_shows_runs(url, say, capsys):
    say("hello, hello")
    (shown,) = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    shown = shown.replace("http://127.0.0.1:8000", url).replace("none", "alpha").replace("smollm2-135m-instruct", NAME)
    exec(compile(shown, str(README), "exec"), {})
    assert capsys.readouterr().out.strip() == "hello, hello"
