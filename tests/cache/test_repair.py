"""Running tokens again in their slots, as if something before them had never been there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, relative, states, tiny, token_ids
from kveraser.cache import Repair, Tokens, repair_slots
from kveraser.model.rope import frequencies, rotary_layout, rotate
from kveraser.spans import gaps


def slots_of(runs):
    return torch.cat([torch.arange(run.start, run.end) for run in runs])


def moved(model, keys, slots, erased, layer):
    """Keys of a shortened context, turned to the places that their tokens have in the whole one."""
    if not rotary_layout(model).rotary[layer]:
        return keys
    delta = torch.tensor([[sum(len(span) for span in erased if span.end <= slot) for slot in slots.tolist()]])
    return rotate(keys, delta, frequencies(model), rotary_layout(model).pairing)


@pytest.mark.parametrize("family", FAMILIES)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_repairing_all_that_follows_equals_a_prefill_without_the_spans_but_for_where_it_is(family, sizes):
    model = tiny(family)
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    erased = [kv.Span(a, b) for a, b in zip(edges[1::2], edges[2::2], strict=False)]
    ids = token_ids(edges[-1] + 5)
    kept = slots_of(gaps(erased, ids.shape[1]))
    cache, fresh = prefill(model, ids), prefill(model, ids[:, kept])
    behind = kept[kept >= erased[0].end]
    repair_slots(model, cache, Tokens(ids), [Repair(behind, kept, tuple(erased))])
    count = len(kept) - len(behind)
    for index, (layer, other) in enumerate(zip(cache.layers, fresh.layers, strict=True)):
        keys = moved(model, other.keys[:, :, count:], behind, erased, index)
        assert relative([layer.keys[:, :, behind]], [keys]) < 1e-4
        assert relative([layer.values[:, :, behind]], [other.values[:, :, count:]]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_repaired_does_not_depend_on_what_the_span_said(family):
    model, span = tiny(family), kv.Span(5, 12)
    ids = token_ids(30)
    other = ids.clone()
    other[0, span.slice] = token_ids(7, seed=9)[0]
    found = []
    for these in (ids, other):
        cache = prefill(model, these)
        behind, kept = torch.arange(12, 25), slots_of([kv.Span(0, 5), kv.Span(12, 30)])
        repair_slots(model, cache, Tokens(these), [Repair(behind, kept, (span,))])
        found.append([tensor[:, :, 12:25] for tensor in states(cache)])
    assert relative(*found) < 1e-6


def test_no_rounded_key_is_ever_rotated():
    model = build(make_config("qwen2"), torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += 200 * torch.rand_like(layer.self_attn.k_proj.bias)
    ids, span = token_ids(40), kv.Span(7, 18)
    cache = prefill(model, ids)
    before = cache.layers[0].keys.clone()
    receipt = kv.erase(model, cache, ids, span, method=kv.Steering(kv.KVEraser.neutral(model), repair=64))
    assert receipt.recomputed == (kv.Span(18, 40),)
    assert relative([cache.layers[0].keys[:, :, 18:]], [before[:, :, 18:]]) < 4e-3  # as the model makes them
    kv.restore(cache, receipt)
    kv.erase(model, cache, ids, span, method="delete-and-shift")
    fresh = prefill(model, torch.cat([ids[:, :7], ids[:, 18:]], 1))
    assert relative([cache.layers[0].keys], [fresh.layers[0].keys]) < 4e-3  # remade where they are now


@given(st.integers(1, 6))
def test_a_padded_row_is_repaired_as_if_it_were_alone(padding):
    model, span = tiny(), kv.Span(10, 16)
    rows = token_ids(30, rows=2)
    mask = torch.ones_like(rows)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = prefill(model, rows, mask=mask)
    kept = slots_of([kv.Span(0, 10), kv.Span(16, 30)])
    chosen = torch.tensor([16, 17, 20, 29])
    repair_slots(model, cache, Tokens(rows, positions, mask), [Repair(chosen, kept, (span,))])
    alone = prefill(model, rows[1:, padding:])
    own = (kept - padding)[kept >= padding]
    repair = Repair(chosen - padding, own, (span.shift(-padding),))
    repair_slots(model, alone, Tokens(rows[1:, padding:]), [repair])
    assert relative([tensor[1:, :, padding:] for tensor in states(cache)], states(alone)) < 1e-4


def test_rows_of_scores_that_do_not_fit_are_computed_in_turns(monkeypatch):
    model, ids = tiny(), token_ids(40)
    found = []
    for most in (1 << 24, 500):
        monkeypatch.setattr("kveraser.model.attention._MOST_SCORES", most)
        cache = prefill(model, ids)
        repair_slots(model, cache, Tokens(ids), [Repair(torch.arange(9, 40), torch.arange(40))])
        found.append(states(cache))
    assert relative(*found) < 1e-6


@given(st.sampled_from(FAMILIES), st.integers(1, 30), st.booleans())
def test_tokens_that_are_too_many_for_one_pass_end_alike_in_several(family, most, weighed):
    model, ids, span = tiny(family), token_ids(60), kv.Span(5, 12)
    sees = torch.tensor([0, 2, 4, *range(12, 60, 2), 59])
    chosen = sees[sees >= 14]
    weights = torch.where(sees % 3 == 0, 2.0, 1.0) if weighed else None
    repair = Repair(chosen, sees, (span,), weights)
    found = []
    for parts in ((repair,), repair.parts(most)):
        cache = prefill(model, ids)
        for part in parts:
            repair_slots(model, cache, Tokens(ids), [part])
        found.append(states(cache))
    assert torch.cat([part.slots for part in repair.parts(most)]).equal(chosen)
    assert max(len(part) for part in repair.parts(most)) <= most
    assert relative(*found) < 1e-5


def test_a_model_whose_attention_cannot_be_told_is_refused_and_nothing_is_lost(monkeypatch):
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids)
    before = states(cache)
    monkeypatch.setattr("kveraser.cache.repair.for_telling", lambda given: given)
    with pytest.raises(kv.UnsupportedCacheError, match="attention interface"):
        kv.erase(model, cache, ids, kv.Span(5, 9), method=kv.Steering(kv.KVEraser.neutral(model), repair=64))
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_that_stands_for_others_weighs_as_much_as_all_of_them_would(family):
    """Slots 4 to 11 hold the same states, so one of them that stands for eight tells as much as all eight."""
    model, ids, behind = tiny(family), token_ids(24), torch.arange(16, 24)
    caches = []
    for sees, stand_for in (  # in one place, so that no rotation tells them apart
        (torch.arange(24), None),
        (slots_of([kv.Span(0, 5), kv.Span(12, 24)]), torch.tensor([1.0] * 4 + [8.0] + [1.0] * 12)),
    ):
        cache = prefill(model, ids)
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held[:, :, 4:12] = held[:, :, 4:5].clone()
        repair_slots(model, cache, Tokens(ids), [Repair(behind, sees, (), stand_for)])
        caches.append([tensor[:, :, 16:] for tensor in states(cache)])
    assert relative(*caches) < 1e-5
