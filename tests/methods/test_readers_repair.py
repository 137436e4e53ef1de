"""Repair by readers: what changes, what equals what, what is said."""

from __future__ import annotations

from itertools import takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import (
    CACHES,
    FAMILIES,
    build,
    make_config,
    prefill,
    random_eraser,
    relative,
    same,
    states,
    tiny,
    token_ids,
)
from kveraser.cache import TransformersBackend, get_marks, transformers
from kveraser.model.rope import frequencies, rotary_layout, rotate
from kveraser.readers import Scene, calibrate, known, remember


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    for family in FAMILIES:
        remember(tiny(family), calibrate(tiny(family), token_ids(500, seed=8)[0]))


def changed(before, after):
    """The slots that changed in any layer."""
    length = before[0].shape[2]
    return {
        s for s in range(length) for a, b in zip(before, after, strict=True) if not torch.equal(a[:, :, s], b[:, :, s])
    }


@pytest.mark.parametrize("kind", ["neutral", "trained"])
@given(
    family=st.sampled_from(FAMILIES), start=st.integers(0, 30), size=st.integers(1, 12), behind=st.integers(1, 60),
    repair=st.integers(0, 20), rows=st.integers(1, 2), cache=st.sampled_from(sorted(CACHES)),
    coverage=st.sampled_from([None, 0.3]), keys=st.sampled_from([None, 3]), block=st.sampled_from([None, 4]),
)  # fmt: skip
def test_only_the_span_and_the_chosen_slots_change_and_restoring_brings_back_every_bit(
    kind, family, start, size, behind, repair, rows, cache, coverage, keys, block
):
    model, span = tiny(family), kv.Span(start, start + size)
    ids = token_ids(span.end + behind, rows)
    held = prefill(model, ids, cache=CACHES[cache]())
    before = states(held)
    eraser = kv.KVEraser.neutral(model) if kind == "neutral" else random_eraser(model)
    if block is not None and 0 < repair < block:
        repair = block
    method = kv.Steering(eraser, repair=repair, coverage=coverage, keys=keys, block=block)
    receipt = kv.erase(model, held, ids, span, method=method)
    allowed = set(span) | {slot for run in receipt.recomputed for slot in run}
    assert changed(before, states(held)) <= allowed
    assert set(span) <= changed(before, states(held))
    recomputed = sum(map(len, receipt.recomputed))
    assert recomputed <= repair
    assert receipt.tokens_recomputed == recomputed + (0 if kind == "neutral" else size)
    assert receipt.residual is None if not repair else 0 <= receipt.residual <= 1
    assert receipt.eraser == kind
    kv.restore(held, receipt)
    assert same(states(held), before)


@given(st.sampled_from(FAMILIES), st.integers(0, 30), st.integers(1, 12), st.integers(1, 40), st.integers(1, 2))
def test_attention_guided_repair_of_everything_is_full_recomputation_bit_for_bit(family, start, size, behind, rows):
    model, ids = tiny(family), token_ids(start + size + behind, rows)
    span = kv.Span(start, start + size)
    exact, guided = prefill(model, ids), prefill(model, ids)
    kv.erase(model, exact, ids, span, method="full-recompute")
    method = kv.AttentionGuidedRepair(tokens=behind + 3, keys=None)
    receipt = kv.erase(model, guided, ids, span, method=method)
    assert same(states(exact), states(guided))
    assert receipt.exact
    assert receipt.residual == 0.0


@given(st.sampled_from(FAMILIES), st.integers(1, 30), st.integers(1, 12), st.integers(1, 40))
def test_kveraser_repairing_everything_is_a_prefill_without_the_span_in_the_old_places(family, start, size, behind):
    model, ids = tiny(family), token_ids(start + size + behind)
    span = kv.Span(start, start + size)
    cache = prefill(model, ids)
    receipt = kv.erase(
        model, cache, ids, span, method=kv.Steering(kv.KVEraser.neutral(model), repair=behind, keys=None)
    )
    fresh = prefill(model, torch.cat([ids[:, :start], ids[:, span.end :]], 1))
    assert not receipt.exact
    for layer, other, rotary in zip(cache.layers, fresh.layers, rotary_layout(model).rotary, strict=True):
        keys = other.keys[:, :, start:]
        if rotary:
            keys = rotate(keys, size, frequencies(model), rotary_layout(model).pairing)
        assert relative([layer.keys[:, :, span.end :]], [keys]) < 1e-4
        assert relative([layer.values[:, :, span.end :]], [other.values[:, :, start:]]) < 1e-4


SPANS = [kv.Span(6, 11), kv.Span(19, 24), kv.Span(30, 33)]


@pytest.mark.parametrize("kind", ["neutral", "readers"])
@pytest.mark.parametrize("earlier", [0, 1])
@given(
    family=st.sampled_from(FAMILIES), repair=st.integers(1, 40), chunk=st.sampled_from([4, 512]),
    window=st.sampled_from([None, (0, 3), (2, 12)]), behind=st.integers(1, 12),
)  # fmt: skip
def test_the_next_tokens_see_nothing_of_any_span_that_is_hidden_with_theirs_or_was_before(
    kind, earlier, family, repair, chunk, window, behind
):
    model, ids = tiny(family), token_ids(33 + behind)
    eraser = kv.KVEraser.neutral(model) if kind == "neutral" else kv.KVEraser.new(model, rank=2, acts_on="readers")
    method = kv.Steering(eraser, repair=repair, choose="next", window=window)
    other = ids.clone()
    for span in SPANS:
        other[:, span.slice] = ids[:, span.slice] % 90 + 3
    found = []
    for these in (ids, other):
        cache = prefill(model, these)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformersBackend, "chunk", chunk)
            for spans in [SPANS[:earlier], SPANS[earlier:]] if earlier else [SPANS]:
                receipt = kv.erase(model, cache, these, spans, method)
                these = receipt.token_ids(these)
        found.append(cache)
    live = [slot for slot in range(len(ids[0])) if not any(slot in span for span in SPANS)]
    done = list(  # up to the first that was not recomputed, and has read whatever it has read
        takewhile(lambda slot: slot < 6 or any(0 <= slot - span.end < repair for span in SPANS), live)
    )
    assert relative(*([tensor[:, :, done] for tensor in states(cache)] for cache in found)) < 1e-5
    if window is None and done == live:
        fresh = prefill(model, ids[:, live])
        for layer, exact in zip(found[0].layers, fresh.layers, strict=True):
            assert relative([layer.values[:, :, live]], [exact.values]) < 1e-4


def test_several_spans_share_one_budget_and_every_reader_is_chosen_once():
    model, ids = tiny("llama"), token_ids(300)
    spans = [kv.Span(20, 40), kv.Span(90, 100)]
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, spans, method=kv.Steering(kv.KVEraser.neutral(model), repair=20))
    chosen = [slot for run in receipt.recomputed for slot in run]
    assert len(chosen) == len(set(chosen)) == 40
    assert {*range(40, 48), *range(100, 108)} <= set(chosen)
    assert not set(chosen) & {*range(20, 40), *range(90, 100)}


@pytest.mark.parametrize("method", [kv.Steering(), kv.AttentionGuidedRepair()], ids=lambda method: method.name)
def test_without_a_number_a_span_gets_seventy_readers_or_two_for_each_of_its_tokens(method):
    model, ids = tiny("llama"), token_ids(400)
    eraser = kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    for spans, readers in (
        ([kv.Span(20, 21)], 70),
        ([kv.Span(20, 55)], 70),
        ([kv.Span(20, 56)], 72),
        ([kv.Span(20, 90)], 140),
        ([kv.Span(20, 30), kv.Span(60, 160)], 270),
    ):
        receipt = kv.erase(model, prefill(model, ids), ids, spans, method=method, eraser=eraser)
        behind = ids.shape[1] - spans[0].end - sum(len(span) for span in spans[1:])
        assert sum(map(len, receipt.recomputed)) == receipt.tokens_recomputed == min(readers, behind)


@pytest.mark.parametrize("method", [kv.Steering(), kv.AttentionGuidedRepair()], ids=lambda method: method.name)
def test_a_longer_text_is_read_by_whom_the_old_one_was_and_by_no_more(method):
    model, ids = tiny("llama"), token_ids(500)
    eraser = kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    receipt = kv.replace(
        model, prefill(model, ids), ids, kv.Span(20, 30), token_ids(150, seed=3)[0], method=method, eraser=eraser
    )
    assert receipt.method == method.name
    assert receipt.tokens_recomputed == 150 + 70


def test_so_many_of_the_next_tokens_follow_each_span_as_its_length_says():
    model, ids = tiny("llama"), token_ids(600)
    eraser = kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    spans = [kv.Span(20, 30), kv.Span(200, 300)]
    receipt = kv.erase(model, prefill(model, ids), ids, spans, method=kv.Steering(choose="next"), eraser=eraser)
    assert receipt.recomputed == (kv.Span(30, 100), kv.Span(300, 500))


def test_a_block_that_is_longer_than_what_a_short_span_gets_is_refused_and_nothing_is_changed():
    model, ids = tiny("llama"), token_ids(400)
    cache, eraser = prefill(model, ids), kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    before = [tensor.clone() for tensor in states(cache)]
    with pytest.raises(kv.OptionError, match="block=128 is more than the repair=70"):
        kv.erase(model, cache, ids, kv.Span(20, 30), method=kv.Steering(block=128), eraser=eraser)
    assert same(before, states(cache))


@pytest.mark.parametrize(
    "method",
    [kv.Steering(), kv.AttentionGuidedRepair(), kv.SelectiveRecompute(tokens=120)],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_in_several_passes_end_as_in_one(method, padded, monkeypatch):
    model, ids, span = tiny("llama"), token_ids(400, rows=2), kv.Span(40, 100)
    mask = torch.ones_like(ids)
    mask[1, : 9 * padded] = 0
    eraser = kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    found, repair_slots, sizes = [], transformers.repair_slots, []

    def watched(model, cache, tokens, repairs, *args):
        sizes.extend(map(len, repairs))
        return repair_slots(model, cache, tokens, repairs, *args)

    monkeypatch.setattr(transformers, "repair_slots", watched)
    for chunk in (512, 32):
        sizes.clear()
        monkeypatch.setattr("kveraser.cache.transformers.TransformersBackend.chunk", chunk)
        cache = prefill(model, ids, mask=mask)
        kv.erase(model, cache, ids, span, method=method, eraser=eraser, attention_mask=mask)
        found.append([tensor[:1] for tensor in states(cache)])
        assert 0 < max(sizes) <= chunk
    assert relative(*found) < 1e-5


@pytest.mark.parametrize("method", [kv.Steering(), kv.AttentionGuidedRepair()], ids=lambda method: method.name)
def test_a_later_pass_that_fails_leaves_the_cache_as_it_was(method, monkeypatch):
    model, ids = tiny("llama"), token_ids(400)
    cache, eraser = prefill(model, ids), kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    before = [tensor.clone() for tensor in states(cache)]
    monkeypatch.setattr("kveraser.cache.transformers.TransformersBackend.chunk", 32)
    repair, calls = transformers.repair_slots, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return repair(*args)

    monkeypatch.setattr(transformers, "repair_slots", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        kv.erase(model, cache, ids, kv.Span(40, 100), method=method, eraser=eraser)
    assert same(before, states(cache))


def test_a_number_is_kept_to_however_long_the_span_is():
    model, ids = tiny("llama"), token_ids(400)
    eraser = kv.KVEraser.neutral(model, repair=30, ids=token_ids(300)[0])
    for method, readers in (("kveraser", 30), (kv.Steering(repair=11), 11), (kv.AttentionGuidedRepair(tokens=9), 9)):
        receipt = kv.erase(model, prefill(model, ids), ids, kv.Span(20, 120), method=method, eraser=eraser)
        assert receipt.tokens_recomputed == readers


def test_what_was_erased_before_is_neither_seen_nor_chosen_and_its_gap_is_closed_too():
    model, ids = tiny("llama"), token_ids(200)
    other = ids.clone()
    other[0, 30:50] = token_ids(20, seed=5)[0]
    found = []
    for these in (ids, other):
        cache, eraser = prefill(model, these), kv.KVEraser.neutral(model)
        kv.erase(model, cache, these, kv.Span(30, 50), method=kv.Steering(eraser, repair=200, keys=None))
        receipt = kv.erase(model, cache, these, kv.Span(80, 90), method=kv.Steering(eraser, repair=200, keys=None))
        assert not any(run.overlaps(kv.Span(30, 50)) for run in receipt.recomputed)
        found.append([tensor[:, :, 50:] for tensor in states(cache)])
    assert relative(*found) < 1e-5
    fresh = prefill(model, torch.cat([ids[:, :30], ids[:, 50:80], ids[:, 90:]], 1))
    assert relative([cache.layers[2].values[:, :, 90:]], [fresh.layers[2].values[:, :, 60:]]) < 1e-4


def test_a_span_that_holds_the_sink_leaves_the_first_tokens_behind_it_as_the_new_one():
    model, ids = tiny("llama"), token_ids(200)
    cache = prefill(model, ids)
    kv.erase(model, cache, ids, kv.Span(0, 10), method=kv.Steering(kv.KVEraser.neutral(model), repair=16))
    fresh = prefill(model, ids[:, 10:])
    for layer, other in zip(cache.layers, fresh.layers, strict=True):
        assert relative([layer.values[:, :, 10:18]], [other.values[:, :, :8]]) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repair": -1}, "repair=-1"),
        ({"coverage": 0.0}, "coverage=0.0"),
        ({"coverage": 1.5}, "coverage=1.5"),
        ({"block": 0}, "block=0"),
        ({"repair": 8, "block": 16}, "block=16 is more than the repair=8"),
        ({"keys": 0}, "keys=0"),
        ({"choose": "best"}, "choose='best'"),
        ({"choose": "next", "coverage": 0.5}, "nothing to choose"),
    ],
)
def test_impossible_options_are_refused_by_name(options, words):
    with pytest.raises(kv.OptionError, match=words):
        kv.Steering(**options)


def test_where_readers_cannot_be_told_the_next_tokens_are_recomputed_and_the_receipt_says_so():
    model = tiny("llama", 1)  # nothing is known of it, and the context is too short to calibrate on
    ids = token_ids(120)
    receipt = kv.erase(model, prefill(model, ids), ids, kv.Span(10, 20), method=kv.Steering(repair=16))
    assert receipt.recomputed == (kv.Span(20, 36),)
    assert receipt.residual is None
    assert "could not be told" in receipt.notes[0]


@pytest.mark.parametrize("method", ["kveraser", "attention-guided-repair", "auto"])
def test_an_erase_calibrates_once_on_what_is_too_little_to_be_kept(method, monkeypatch):
    model, ids = build(make_config("llama", 1)), token_ids(400)  # nothing is known of it
    made, really = [], known.calibrate

    def watched(*arguments):
        made.append(arguments)
        return really(*arguments)

    monkeypatch.setattr(known, "calibrate", watched)
    for count in (1, 2):
        kv.erase(model, prefill(model, ids), ids, kv.Span(10, 20), method=method)
        assert len(made) == count


def test_an_erase_that_is_interrupted_while_readers_are_told_changes_nothing(monkeypatch):
    model, ids = tiny("llama"), token_ids(200)
    cache = prefill(model, ids)
    before = states(cache)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scene, "close", stop)
    with pytest.raises(KeyboardInterrupt):
        kv.erase(model, cache, ids, kv.Span(10, 20), method=kv.Steering(repair=16))
    assert same(states(cache), before)
    assert get_marks(cache).exact


def test_coverage_repairs_fewer_tokens_when_few_have_read_the_span():
    model, ids = tiny("llama"), token_ids(400)
    counts = []
    for coverage in (0.2, 0.6, None):
        method = kv.Steering(kv.KVEraser.neutral(model), repair=200, coverage=coverage)
        receipt = kv.erase(model, prefill(model, ids), ids, kv.Span(100, 120), method=method)
        counts.append(sum(map(len, receipt.recomputed)))
        assert receipt.residual <= 1 - (coverage or 0.6) + 1e-3
    assert counts == sorted(counts)
    assert counts[0] < counts[2] == 200
