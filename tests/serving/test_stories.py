"""The four stories through the server and the `openai` client, with the real model: a message is dropped, and what it said
is gone."""

from __future__ import annotations

import openai
import pytest
from serving_helpers import REAL, running

from kveraser.demo.stories import pages, stories
from kveraser.evaluation import leaks
from kveraser.evaluation.runner import DEFAULT_BUDGET
from kveraser.serving.service import Service

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def ask(smollm):
    """Asks as any client does; gives the text, what the server says of it, and the number of prompt tokens."""
    with running(Service(*smollm), name=REAL) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def asked(talk, policy):
            reply = client.chat.completions.create(
                model=REAL, messages=talk, max_tokens=12, temperature=0, extra_body={"kveraser": {"policy": policy}}
            )
            return reply.choices[0].message.content, reply.model_extra["kveraser"], reply.usage

        yield asked


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_a_dropped_message_is_steered_away_and_nearly_all_else_is_reused(ask, story):
    parts = [*[page for page in pages() if len(page) > 100][-6:], story.prefix, story.span, story.suffix]
    opening = {"role": "system", "content": f"This is about a {story.name}."}  # nothing is shared between the stories
    talk = [opening, *({"role": "user", "content": part.strip()} for part in [*parts, story.question])]
    ask(talk, "exact")
    text, found, usage = ask([entry for entry in talk if entry["content"] != story.span.strip()], "kveraser")
    assert found["method"] == "kveraser"
    assert not found["exact"]
    # at most what has read the message is run again, and the last token, as for every request
    assert usage.prompt_tokens - found["tokens_reused"] <= DEFAULT_BUDGET + 1
    assert usage.prompt_tokens_details.cached_tokens == found["tokens_reused"]
    assert 0 < found["residual"] < 1
    assert found["eraser"] == "neutral"
    assert 0 < sum(end - start for start, end in found["recomputed"]) <= DEFAULT_BUDGET
    assert not leaks(text, story.erased), text
