"""OpenAI's Agents SDK with a session that is trimmed: `make test-clients`."""

from __future__ import annotations

import asyncio

import openai
import pytest
from agents import (  # fmt: skip
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from serving_helpers import NAME, running, tiny_service, tool_tokenizer

CALL = '<tool_call>\n{"name": "look", "arguments": {"what": "the door"}}\n</tool_call>'


@function_tool
def look(what: str) -> str:
    """Looks at something."""
    return f"here is {what}: the code of it is 1234 and the car is fast"


class Trimmed(SQLiteSession):
    """Keeps the last few turns of the user only."""

    async def get_items(self, limit=None):
        items = await super().get_items(limit)
        turns = [index for index, item in enumerate(items) if item.get("role") == "user"]
        return items[turns[-2] :] if len(turns) > 2 else items


@pytest.mark.parametrize("streamed", [False, True])
def test_a_session_that_is_trimmed_goes_on(say, streamed):
    set_tracing_disabled(True)
    say(*[CALL, "it is 1234"] * 4)
    service = tiny_service(tool_tokenizer(), cache_budget=1 << 24, policy="kveraser")

    async def talk(url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = OpenAIChatCompletionsModel(model=NAME, openai_client=client)
        agent = Agent(
            "guide", instructions="be kind", tools=[look], model=model, model_settings=ModelSettings(max_tokens=300)
        )
        session, said = Trimmed("one"), []
        for number in range(4):
            question = f"what is the code of door {number}?"
            if streamed:
                result = Runner.run_streamed(agent, question, session=session)
                async for _ in result.stream_events():
                    pass
            else:
                result = await Runner.run(agent, question, session=session)
            said.append((result.final_output, result.context_wrapper.usage))
        return said

    with running(service) as url:
        said = asyncio.run(talk(url))
    assert [output for output, _ in said] == ["it is 1234"] * 4
    if not streamed:
        used = said[-1][1]
        assert used.input_tokens_details.cached_tokens > used.input_tokens / 2
