"""What live contexts of transformers can do besides: the options of `model.generate`, and agreement with the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import kveraser as kv
from conftest import (
    build,
    make_config,
    make_tokenizer,
    prefill,
    random_eraser,
    relative,
    same,
    states,
    text_model,
    tiny,
    token_ids,
)


def filled(*sizes, **options):
    context = kv.ErasableContext(tiny(), eraser=random_eraser(tiny(), **options))
    spans = [context.append_ids(token_ids(size, seed=index)[0]) for index, size in enumerate(sizes)]
    return context, spans


def test_generating_without_new_text_runs_the_last_token_again():
    context, _ = filled(12)
    model, ids = context.model, torch.tensor([context.live_ids])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert context.generate_ids(max_new_tokens=5) == expected[0, 12:].tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_generate_options_work_and_see_no_erased_id(options):
    context, spans = filled(12, 5, 9)
    context.erase_spans(spans[1], "full-recompute")
    ids = torch.tensor([[*context.live_ids, 7]])
    settings_ = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = context.model.generate(ids, **settings_, **options)[0, ids.shape[1] :].tolist()
    assert context.generate_ids([7], max_new_tokens=5, **options) == expected


def test_no_logits_processor_ever_sees_an_erased_id():
    context, spans = filled(12, 5, 9)
    secret = (
        set(context._ids.view[spans[1].slice].tolist())
        - set(context._ids.view[:12].tolist())
        - set(context._ids.view[17:].tolist())
    )
    assert secret
    context.erase_spans(spans[1])
    seen = set()

    def spy(input_ids, scores):
        seen.update(input_ids.flatten().tolist())
        return scores

    context.generate_ids([], max_new_tokens=1, logits_processor=[spy])
    assert seen
    assert not seen & secret


def test_keeping_what_was_generated_by_beams_equals_appending_it():
    again, _ = filled(12)
    assert again.generate_ids([5, 6], max_new_tokens=6, keep=True, num_beams=2)
    assert again.exact
    assert relative(states(again.cache), states(prefill(again.model, torch.tensor([again.live_ids])))) < 1e-5


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("of_the_model", [False, True])
def test_rows_that_a_generation_config_asks_for_are_none_of_the_contexts(name, of_the_model, monkeypatch):
    context, _ = filled(64)  # which fills the buffers to the last slot
    wanted = GenerationConfig(**{name: 2}, do_sample=True)
    if of_the_model:
        monkeypatch.setattr(context.model, "generation_config", wanted)
    options = {"do_sample": True} if of_the_model else {"generation_config": wanted, "do_sample": True}
    before = states(context.cache)
    assert len(context.generate_ids([5], max_new_tokens=3, **options)) <= 3
    assert same(states(context.cache), before)


def test_logits_are_those_of_a_fresh_forward():
    context, _ = filled(12)
    with torch.no_grad():
        expected = context.model(torch.tensor([[*context.live_ids, 5, 6]])).logits[0].float()
    assert torch.allclose(context.logits_ids([5, 6]), expected[-2:], atol=1e-4)
    assert torch.allclose(context.logits_ids([5, 6], from_last=True), expected[-3:], atol=1e-4)
    assert context.logits_ids([5]).dtype == torch.float32


# -- text ------------------------------------------------------------------------------------------------------------


def text_context():
    return kv.ErasableContext(text_model(), make_tokenizer(), random_eraser(text_model()))


def test_a_context_without_tokenizer_takes_ids_and_says_so_about_text():
    ctx = kv.ErasableContext(text_model())
    ctx.append([5, 6, 7])
    with pytest.raises(kv.ContextError, match="no tokenizer"):
        ctx.append("text")


def test_a_model_that_cannot_be_edited_is_refused_at_once():
    model = build(make_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(kv.UnsupportedCacheError, match="dynamic-NTK"):
        kv.ErasableContext(model)


@pytest.mark.parametrize("take", [False, True])
def test_a_prefix_is_a_context_of_its_own(take):
    ctx = text_context()
    ctx.append("the code of the door is 1234. the car is blue and fast.")
    ids, before = ctx.live_ids, states(ctx.cache)
    branch = ctx.prefix(10, take=take)
    assert branch.live_ids == ids[:10]
    assert same(states(branch.cache), [tensor[:, :, :10] for tensor in before])
    branch.append("it is fast")
    assert len(ctx) == (0 if take else len(ids))
    assert take or same(states(ctx.cache), before)
    ctx.append("more")
    branch.erase(kv.Span(3, 6))
    with pytest.raises(kv.ContextError, match="first 3 tokens are exact"):
        branch.prefix(4)


def test_a_session_of_another_model_or_type_is_refused(tmp_path):
    ctx = text_context()
    ctx.append("the code is 1234")
    ctx.save(tmp_path / "s")
    other = build(make_config("llama", vocab_size=len(make_tokenizer())), seed=9)
    with pytest.raises(kv.SessionFileError, match="another model"):
        kv.ErasableContext.load(tmp_path / "s", other, ctx.tokenizer)
    with pytest.raises(kv.SessionFileError, match="bfloat16"):
        kv.ErasableContext.load(tmp_path / "s", text_model(torch.bfloat16), ctx.tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(kv.SessionFileError, match="is a file"):
        ctx.save(tmp_path / "file")


def test_a_context_that_was_erased_whole_is_restored():
    context = kv.ErasableContext(text_model(), make_tokenizer())
    span = context.append("the code is 1234. ")
    receipt = context.erase(span)
    assert context.live_ids == []
    context.restore(receipt)
    assert context.live_ids == context.encode("the code is 1234. ")
    assert context.exact
