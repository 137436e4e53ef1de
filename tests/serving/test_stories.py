"""The four stories through the server, with the real model: a message is dropped, and what it said is gone."""

from __future__ import annotations

import pytest

from kveraser.demo.stories import pages, stories
from kveraser.evaluation import leaks
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine, Prompt

pytestmark = pytest.mark.model


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_a_dropped_message_is_steered_away_and_nearly_all_else_is_reused(smollm, story):
    engine = Engine(*smollm)
    parts = [*[page for page in pages() if len(page) > 100][-6:], story.prefix, story.span, story.suffix]
    talk = [{"role": "user", "content": part.strip()} for part in parts] + [{"role": "user", "content": story.question}]

    def ask(entries, policy):
        text = engine.tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=True)
        ids = tuple(engine.tokenizer.encode(text, add_special_tokens=False))
        prompt = Prompt("", ids, policy, Sampling(12))
        return engine.submit(lambda job: engine.complete(prompt, job)).future.result(120)

    try:
        ask(talk, "exact")
        reply = ask([entry for entry in talk if entry["content"] != story.span.strip()], "kveraser")
        assert reply.reuse.method == "kveraser"
        assert not reply.reuse.exact
        assert reply.reuse.tokens_reused >= 0.95 * reply.prompt_tokens
        assert not leaks(reply.text, story.erased), reply.text
    finally:
        engine.close()
