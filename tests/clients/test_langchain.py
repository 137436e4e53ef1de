"""LangChain's agent with its middleware that clears tool results, over both APIs: `make test-clients`."""

from __future__ import annotations

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ClearToolUsesEdit, ContextEditingMiddleware
from langchain.tools import tool
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from serving_helpers import NAME, running, tiny_service, tool_tokenizer

CALL = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'


@tool
def look(what: str) -> str:
    """Looks at something."""
    return f"here is {what}: the code of it is 1234 and the car is fast. " * 3


def openai_model(url):
    return ChatOpenAI(model=NAME, base_url=f"{url}/v1", api_key="none", max_tokens=300, max_retries=0)


def anthropic_model(url):
    return ChatAnthropic(model=NAME, base_url=url, api_key="none", max_tokens=300, max_retries=0)


@pytest.mark.parametrize("model", [openai_model, anthropic_model])
@pytest.mark.parametrize("inputs", [False, True])
def test_an_agent_that_clears_old_results_runs_to_its_end(model, inputs, say):
    say(CALL, CALL, CALL, CALL, "it is 1234")
    edit = ClearToolUsesEdit(trigger=100, keep=1, clear_tool_inputs=inputs)
    middleware = ContextEditingMiddleware(edits=[edit], token_count_method="approximate")
    service = tiny_service(tool_tokenizer(), cache_budget=1 << 24, policy="kveraser")
    with running(service) as url:
        agent = create_agent(model(url), [look], middleware=[middleware])
        result = agent.invoke({"messages": [{"role": "user", "content": "what is the code of the door?"}]})
    last = result["messages"][-1]
    assert last.content == "it is 1234"
    assert sum(message.type == "tool" for message in result["messages"]) == 4
    assert last.usage_metadata["input_token_details"]["cache_read"] > last.usage_metadata["input_tokens"] / 3
