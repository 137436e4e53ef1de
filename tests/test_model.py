"""The real embedded model: the demo's promise, the shipped eraser, the README's snippets."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import kveraser as kv
from kveraser.demo.stories import stories
from kveraser.demo.tell import tell
from kveraser.eraser import shipped_eraser, shipped_erasers
from kveraser.evaluation import leaks
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.methods import FullRecompute, NoErase

pytestmark = pytest.mark.model
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def told(smollm):
    model, tokenizer = smollm
    eraser = shipped_eraser(model)
    methods = [NoErase(), FullRecompute(), kv.Steering(), kv.DeleteAndShift()]
    return {
        (story.name, protocol): (
            story,
            {r.method: r for r in tell(story, kv.ErasableContext(model, tokenizer, eraser), methods, protocol)},
        )
        for story in stories()
        for protocol in PROTOCOLS
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [story.name for story in stories()])
def test_the_erased_value_is_in_no_answer_after_erasing(told, name, protocol):
    story, results = told[name, protocol]
    assert leaks(results["no-erase"].answer, story.erased)
    assert not leaks(results["full-recompute"].answer, story.erased)
    assert not leaks(results["kveraser"].answer, story.erased)
    assert results["full-recompute"].kl < 1e-3
    assert results["kveraser"].kl < results["no-erase"].kl


@pytest.mark.parametrize("name", [story.name for story in stories()])
def test_full_recomputation_finds_what_the_rest_of_the_context_says(told, name):
    story, results = told[name, "query_after"]
    assert story.gold.lower() in results["full-recompute"].answer.lower()


def test_the_shipped_eraser_is_small_and_loaded_by_default(smollm):
    model, tokenizer = smollm
    (folder,) = shipped_erasers().values()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12 * 2**20
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    ctx = kv.ErasableContext(model, tokenizer)
    ctx.append("The code of the door is 1234. The code of the safe is 99.")
    assert ctx.erase("The code of the door is 1234.").method == "kveraser"


def test_full_recomputation_equals_a_fresh_prefill_on_the_real_model(smollm):
    model, tokenizer = kv.load_backbone(dtype="fp32")
    story = stories()[0]
    ctx, fresh = kv.ErasableContext(model, tokenizer), kv.ErasableContext(model, tokenizer)
    ctx.append(story.prefix)
    span = ctx.append(story.span)
    ctx.append(story.suffix)
    ctx.erase(span, "full-recompute")
    fresh.append(story.prefix)
    fresh.append(story.suffix)
    assert (ctx.logits(" The") - fresh.logits(" The")).abs().max() < 1e-4
    assert ctx.live_ids == fresh.live_ids


def test_the_chat_template_of_the_embedded_model_works(smollm):
    model, tokenizer = smollm
    ctx = kv.ErasableContext(model, tokenizer)
    ctx.append_message("user", "What is the weather?")
    ctx.append_message("tool", "Snow, minus 6 degrees.", id="call-1")
    ctx.append_message("tool", "Sunny, 24 degrees.")
    messages = [("user", "What is the weather?"), ("tool", "Snow, minus 6 degrees."), ("tool", "Sunny, 24 degrees.")]
    assert ctx.text == tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)
    ctx.erase("call-1", "full-recompute")
    assert "Snow" not in ctx.text
    assert ctx.generate("So?", max_new_tokens=8)


def test_the_snippets_of_the_readme_run_and_print_what_it_shows(smollm):
    blocks = re.findall(
        r"```python\n(.*?)```\n+(?:It prints[^\n]*\n+```\n(.*?)```)?", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) >= 2
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), {"__name__": "readme"})
        for line in filter(None, (shown or "").splitlines()):
            assert line in printed.getvalue()
    assert torch.is_grad_enabled()
