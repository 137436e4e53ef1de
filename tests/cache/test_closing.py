"""Tokens that are read after a steered span see what was before it as if there were no gap."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, random_eraser, same, states, token_ids
from kveraser.cache import Steered, closing_gaps, get_marks

EVERYTHING = kv.Steering(repair=1000, keys=None)


def contexts(model, spans, ids, method):
    """Two contexts of the same ids: spans erased by the method, and recomputed exactly."""
    found = []
    for chosen in (method, "full-recompute"):
        context = kv.ErasableContext(model, None, kv.KVEraser.neutral(model, ids=token_ids(300)[0]))
        context.append(ids)
        for span in spans:
            context.erase(span, chosen)
        found.append(context)
    return found


@pytest.mark.parametrize(
    "spans", [[kv.Span(9, 20)], [kv.Span(6, 13), kv.Span(20, 24)], [kv.Span(20, 24), kv.Span(9, 20)]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_of_the_suffix_recomputed_what_comes_later_is_that_of_full_recomputation(family, spans):
    model = build(make_config(family))
    steered, exact = contexts(model, spans, token_ids(60)[0].tolist(), EVERYTHING)
    assert get_marks(steered.cache).steered_spans
    asked = token_ids(7, seed=3)[0].tolist()
    close = {"atol": 1e-4, "rtol": 1e-4}
    assert torch.allclose(steered.logits_ids(asked), exact.logits_ids(asked), **close)
    assert torch.allclose(steered.logits_ids(asked, from_last=True), exact.logits_ids(asked, from_last=True), **close)
    assert steered.generate_ids(asked, max_new_tokens=4) == exact.generate_ids(asked, max_new_tokens=4)
    rows = [context.advance(asked) for context in (steered, exact)]
    assert torch.allclose(*rows, **close)
    assert torch.allclose(steered.logits_ids([5]), exact.logits_ids([5]), **close)  # what was appended, too


def test_without_closing_the_gap_shows():
    model = build(make_config("llama"))
    steered, exact = contexts(model, [kv.Span(9, 40)], token_ids(60)[0].tolist(), EVERYTHING)
    asked = token_ids(7, seed=3)[0].tolist()
    closed = (steered.logits_ids(asked) - exact.logits_ids(asked)).abs().max()
    steered.backend.reading = lambda otherwise=None: closing_gaps(model, (), otherwise or model)
    left_open = (steered.logits_ids(asked) - exact.logits_ids(asked)).abs().max()
    assert closed < 1e-4 < 1e-2 < left_open


def test_a_trained_eraser_keeps_the_gap_that_it_was_trained_with():
    model = build(make_config("llama"))
    context = kv.ErasableContext(model, None, random_eraser(model))
    context.append(token_ids(60)[0].tolist())
    context.erase(kv.Span(9, 20))
    with context.backend.reading() as used:
        assert used is model


def test_looking_ahead_and_beams_leave_the_context_as_it_was_and_agree_with_reading():
    model = build(make_config("llama"))
    context, _ = contexts(model, [kv.Span(9, 20)], token_ids(60)[0].tolist(), kv.Steering(repair=8))
    before = [layer.keys.clone() for layer in context.cache.layers]
    asked = token_ids(600, seed=3)[0].tolist()  # more than one chunk
    ahead = context.logits_ids(asked)
    context.generate_ids(asked[:3], max_new_tokens=3, num_beams=2)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, context.cache.layers, strict=True))
    last = context.advance(asked)
    assert torch.allclose(ahead[-1], last, atol=1e-4)


def test_where_nothing_is_steered_the_model_itself_is_run():
    model = build(make_config("llama"))
    with closing_gaps(model, (), model) as used:
        assert used is model
    context, _ = contexts(model, [kv.Span(9, 20)], token_ids(60)[0].tolist(), kv.Steering(repair=8))
    with closing_gaps(model, get_marks(context.cache).steered, model) as used:
        assert used is not model


@torch.no_grad()
def test_on_a_plain_cache_later_tokens_are_read_with_the_model_that_reading_gives():
    model, ids = build(make_config("qwen2")), token_ids(60)
    found = []
    for method in (EVERYTHING, "full-recompute"):
        cache = prefill(model, ids)
        receipt = kv.erase(
            model, cache, ids, kv.Span(9, 20), method, eraser=kv.KVEraser.neutral(model, ids=token_ids(300)[0])
        )
        after = torch.cat([receipt.token_ids(ids), token_ids(5, seed=3)], -1)
        with kv.reading(model, cache) as reader:
            assert (reader is model) == (method == "full-recompute")
            said = reader.generate(
                after, attention_mask=torch.ones_like(after), past_key_values=cache, max_new_tokens=4, do_sample=False
            )
            found.append((said[0, after.shape[1] :].tolist(), reader(said[:, -1:], past_key_values=cache).logits))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


@torch.no_grad()
def test_padded_rows_are_refused_across_closed_gaps():
    model, ids = build(make_config("llama")), token_ids(40, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = prefill(model, ids, mask=mask)
    kv.erase(model, cache, ids, kv.Span(9, 20), "kveraser", attention_mask=mask)
    more = torch.cat([mask, mask[:, -1:]], -1)
    with kv.reading(model, cache) as reader, pytest.raises(kv.UnsupportedCacheError, match="padded rows"):
        reader(ids[:, :1], past_key_values=cache, attention_mask=more)


@torch.no_grad()
def test_a_model_that_changes_its_scores_is_refused_by_name_for_hiding_and_across_closed_gaps():
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, layer_types=["full_attention"] * 2, attn_logit_softcapping=0.5,
    )  # fmt: skip
    model, ids = build(config), token_ids(40)[0]
    model.set_attn_implementation("eager")
    context = kv.ErasableContext(model)
    context.append(ids)
    before = states(context.cache)
    with pytest.raises(kv.UnsupportedCacheError, match="softcap.*delete-and-shift"):
        context.erase(kv.Span(9, 20), kv.KVEraser.neutral(model))
    assert same(states(context.cache), before)
    hidden = Steered(kv.Span(9, 20), torch.zeros(1, 11, 8))
    with closing_gaps(model, [hidden], model) as reader, pytest.raises(kv.UnsupportedCacheError, match="softcap"):
        reader(ids[None, :1], past_key_values=context.cache)
