"""The real embedded model: the demo's promise, the shipped eraser, the README's snippets."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

import kveraser as kv
from kveraser.cli.demo import PAGES
from kveraser.demo.stories import stories
from kveraser.demo.tell import tell, tell_both
from kveraser.eraser import shipped_eraser, shipped_erasers
from kveraser.evaluation import leaks
from kveraser.evaluation.compare import PROTOCOLS, compare_methods, read_parts
from kveraser.evaluation.runner import DEFAULT_BUDGET
from kveraser.methods import FullRecompute, NoErase
from kveraser.tasks import Filler, Sizes, as_task
from kveraser.tasks.sources import read_passages

pytestmark = pytest.mark.model
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def told(smollm):
    model, tokenizer = smollm
    eraser = shipped_eraser(model)
    methods = [NoErase(), FullRecompute(), kv.Steering()]
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


@pytest.mark.parametrize("index", range(len(stories())))
def test_in_the_demo_every_answer_is_that_of_full_recomputation_with_a_seventh_of_its_tokens(smollm, index):
    model, tokenizer = smollm
    methods = [FullRecompute(), kv.Steering().with_budget(DEFAULT_BUDGET)]
    told = tell_both(stories(PAGES)[index], kv.ErasableContext(model, tokenizer), methods)
    assert told.behind > 400
    for exact, erased in (told.after, told.cached):
        assert erased.answer == exact.answer
        assert erased.tokens_recomputed * 7 < exact.tokens_recomputed
        assert 0 < erased.residual < 1


@pytest.mark.parametrize("name", [story.name for story in stories()])
def test_full_recomputation_finds_what_the_rest_of_the_context_says(told, name):
    story, results = told[name, "query_after"]
    assert story.gold.lower() in results["full-recompute"].answer.lower()


@pytest.mark.parametrize("name", shipped_erasers())
def test_what_ships_for_a_backbone_is_small_and_says_its_licence(name):
    folder = shipped_erasers()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 18e6
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    assert (folder / "readers.safetensors").is_file()


def test_the_embedded_model_erases_without_being_told_how(smollm):
    model, tokenizer = smollm
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


def test_the_calibration_that_ships_tells_this_model_well(smollm):
    model, _ = smollm
    calibration = shipped_eraser(model).calibration
    calibration.check(model)
    assert calibration.explained > 0.9
    assert len(calibration.probes) == 5


def test_recomputing_readers_leaves_far_less_than_recomputing_the_next_tokens(smollm):
    """Mislabelled demonstrations: what they leave behind sits in labels all over the suffix."""
    model, tokenizer = smollm
    filler = Filler(read_passages(None), lambda part: len(tokenizer.encode(part, add_special_tokens=False)))
    ours, theirs = [], []
    for example in itertools.islice(as_task("in-context").examples(filler, Sizes.context(500), "eval", 3), 3):
        context = kv.ErasableContext(model, tokenizer)
        spans = read_parts(context, example.parts)
        context.append(example.question)
        mine, next_ones = compare_methods(
            context, spans, None, [kv.Steering(), kv.LocalSuffixRepair(tokens=64)], max_new_tokens=6
        )
        ours.append(mine.kl)
        theirs.append(next_ones.kl)
    assert sum(ours) < 0.5 * sum(theirs)


@pytest.mark.parametrize("ahead", [0, 3000])
def test_neutral_states_are_as_good_as_a_mask_also_far_behind_them(smollm, ahead):
    model, tokenizer = smollm
    ids = torch.tensor([tokenizer.encode(" ".join(read_passages(None)[:60]), add_special_tokens=False)[: 660 + ahead]])
    span, last = kv.Span(200, 264), 600 + ahead
    cache, where = DynamicCache(), torch.arange(600, last)[None]
    with torch.no_grad():
        model(ids[:, :600], past_key_values=cache)
        kv.erase(model, cache, ids[:, :600], span, method=kv.Steering(kv.KVEraser.neutral(model), repair=0))
        if ahead:
            model(ids[:, 600:last], position_ids=where, past_key_values=cache)
        mask = torch.ones_like(ids)
        mask[:, span.slice] = 0
        rest = {"position_ids": torch.arange(last, last + 60)[None]}
        masked = model(ids[:, last:], past_key_values=copy.deepcopy(cache), attention_mask=mask, **rest).logits.float()
        plain = model(ids[:, last:], past_key_values=cache, **rest).logits.float()
    truth = masked.log_softmax(-1)
    assert (truth.exp() * (truth - plain.log_softmax(-1))).sum(-1).mean() < 1e-3
