"""The invariants of the design, for every method, architecture, type and shape."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import CACHES, FAMILIES, next_logits, prefill, random_eraser, relative, same, states, tiny, token_ids
from kveraser.spans import merge_spans

ERASING = [name for name in kv.methods() if name != "no-erase"]


@st.composite
def cases(draw, least_suffix=0):
    """Architecture, type, heads, batch, cache, context length, and one to four spans anywhere in it, also adjacent."""
    family = draw(st.sampled_from(FAMILIES))
    length = draw(st.integers(6, 60))
    last = length - least_suffix
    edges = sorted(draw(st.sets(st.integers(0, last), min_size=2, max_size=6)))
    runs = [kv.Span(a, b) for a, b in pairwise(edges)]
    spans = draw(st.lists(st.sampled_from(runs), min_size=1, max_size=4, unique=True).map(sorted))
    return {
        "model": tiny(family, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([torch.float32, torch.bfloat16]))),
        "ids": token_ids(length, draw(st.integers(1, 3)), draw(st.integers(0, 9))),
        "spans": spans,
        "cache": CACHES[draw(st.sampled_from(sorted(CACHES)))],
    }


def borders(spans):
    """Chunk borders at the borders of the spans (adjacent ones are erased as one)."""
    return [edge for span in merge_spans(spans, 99) for edge in (span.start, span.end)]


def kept(ids, spans):
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    for span in spans:
        keep[span.slice] = False
    return ids[:, keep]


@given(cases(least_suffix=1))
def test_a_zero_eraser_without_window_changes_no_bit_when_chunks_end_at_the_spans_borders(case):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, borders(spans), case["cache"]())
    before = states(cache)
    receipt = kv.erase(model, cache, ids, spans, eraser=kv.KVEraser.new(model, rank=2))
    assert same(states(cache), before)
    assert receipt.method == "kveraser"
    assert receipt.positions_kept
    assert not receipt.exact


@given(cases(least_suffix=1))
def test_a_zero_eraser_changes_nothing_beyond_rounding_however_the_cache_was_prefilled(case):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, None, case["cache"]())
    before = states(cache)
    kv.erase(model, cache, ids, spans, eraser=kv.KVEraser.new(model, rank=2))
    assert relative(states(cache), before) < (1e-5 if model.dtype == torch.float32 else 2e-2)


@given(cases(least_suffix=1))
def test_full_recomputation_equals_a_fresh_prefill_of_the_shortened_context(case):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, borders(spans), case["cache"]())
    receipt = kv.erase(model, cache, ids, spans, method="full-recompute")
    short = kept(ids, spans)
    fresh = prefill(model, short, [spans[0].start])
    assert receipt.exact
    assert torch.equal(receipt.token_ids(ids), short)
    assert same(states(cache), states(fresh))
    if short.shape[1]:
        other = prefill(model, short)
        more = token_ids(4, ids.shape[0], 5)
        difference = (next_logits(model, cache, more) - next_logits(model, other, more)).abs().max()
        assert difference < (1e-4 if model.dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("method", list(kv.methods()))
@given(case=cases())
def test_restore_brings_back_every_bit(method, case):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, None, case["cache"]())
    before = states(cache)
    receipt = kv.erase(model, cache, ids, spans, method=method, eraser=random_eraser(model))
    assert kv.restore(cache, receipt) == 0
    assert same(states(cache), before)


@given(cases(least_suffix=1), st.sampled_from([None, (1, 3), (0, 4), (2, 0)]))
def test_kveraser_touches_only_the_span(case, window):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, None, case["cache"]())
    before = states(cache)
    kv.erase(model, cache, ids, spans, eraser=random_eraser(model, window=window))
    inside = torch.zeros(ids.shape[1], dtype=torch.bool)
    for span in spans:
        inside[span.slice] = True
    for old, new in zip(before, states(cache), strict=True):
        assert torch.equal(old[:, :, ~inside], new[:, :, ~inside])
        assert not torch.equal(old[:, :, inside], new[:, :, inside])


@pytest.mark.parametrize("method", list(kv.methods()))
@given(case=cases(least_suffix=1))
def test_generation_goes_on_from_the_edited_cache(method, case):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, None, case["cache"]())
    receipt = kv.erase(model, cache, ids, spans, method=method, eraser=random_eraser(model))
    new = token_ids(3, ids.shape[0], 7)
    prompt = torch.cat([receipt.token_ids(ids), new], 1)
    scratch = copy.deepcopy(cache)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(prompt, past_key_values=scratch, **options)[:, prompt.shape[1] :]
    first = next_logits(model, cache, new)[:, -1].argmax(-1)
    assert torch.equal(generated[:, 0], first)
    if receipt.exact:
        fresh = model.generate(prompt, **options)[:, prompt.shape[1] :]
        if model.dtype == torch.float32:
            assert torch.equal(generated, fresh)


@pytest.mark.parametrize("method", ERASING)
@given(case=cases(), data=st.data())
def test_a_span_that_ends_the_context_is_cropped_exactly_and_for_free(method, case, data):
    model, ids = case["model"], case["ids"]
    cut = data.draw(st.integers(0, ids.shape[1] - 1))
    cache = prefill(model, ids, None, case["cache"]())
    before = states(cache)
    receipt = kv.erase(model, cache, ids, kv.Span(cut, ids.shape[1]), method=method, eraser=random_eraser(model))
    assert receipt.exact
    assert receipt.tokens_recomputed == 0
    assert cache.get_seq_length() == cut
    if cut:
        assert same(states(cache), [tensor[:, :, :cut] for tensor in before])
    kv.restore(cache, receipt)
    assert same(states(cache), before)


@given(cases(least_suffix=1), st.integers(1, 12))
def test_receipts_say_what_was_done(case, tokens):
    model, ids, spans = case["model"], case["ids"], case["spans"]
    cache = prefill(model, ids, None, case["cache"]())
    erased = sum(len(span) for span in spans)
    receipt = kv.erase(model, cache, ids, spans, eraser=random_eraser(model))
    per_token = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in states(cache))
    assert receipt.tokens_removed == receipt.tokens_recomputed == erased
    assert receipt.bytes_written == erased * per_token
    assert receipt.span == kv.Span(spans[0].start, spans[-1].end)
    ids_now = receipt.token_ids(ids)
    assert ids_now.shape == ids.shape
    for span in spans:  # stand-ins are ids of tokens that are still there
        for row in range(ids.shape[0]):
            assert set(ids_now[row, span.slice].tolist()) <= set(kept(ids, spans)[row].tolist())
    kv.restore(cache, receipt)
    receipt = kv.erase(model, cache, ids, spans, method=kv.LocalSuffixRepair(tokens=tokens))
    assert receipt.tokens_recomputed <= tokens * len(spans)
    assert receipt.token_ids(ids).shape[1] == cache.get_seq_length() == ids.shape[1] - erased
    assert not receipt.positions_kept
