"""LiteLLM in front of the server, by both APIs: `make test-clients`."""

from __future__ import annotations

import json

import litellm
import pytest
from serving_helpers import NAME, running, tiny_service, tool_tokenizer

ASK = [{"role": "user", "content": "what is the code of the door?"}]
LOOK = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {
    "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'


@pytest.fixture(scope="module")
def url():
    with running(tiny_service(tool_tokenizer(), cache_budget=1 << 24)) as address:
        yield address


@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1"), ("anthropic", "")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result_pass_through(url, say, provider, path, stream):
    say(CALL, "it is 1234")
    options = {
        "model": f"{provider}/{NAME}",
        "api_base": f"{url}{path}",
        "api_key": "none",
        "max_tokens": 300,
        "tools": [LOOK],
    }

    def ask(talk):
        reply = litellm.completion(messages=talk, stream=stream, **options)
        return litellm.stream_chunk_builder(list(reply), messages=talk) if stream else reply

    message = ask(ASK).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"what": "the door"}
    talk = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "1234"}]
    assert ask(talk).choices[0].message.content == "it is 1234"
