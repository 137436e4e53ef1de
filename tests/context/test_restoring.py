"""Restoring edits in any order: nothing that was erased later comes back, and in the end every bit is what it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import prefill, random_eraser, relative, same, states, tiny, token_ids
from kveraser.context import TokenContext
from kveraser.readers import calibrate, remember


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    remember(tiny(), calibrate(tiny(), token_ids(500, seed=8)[0]))


def erased_context(ids, spans, method):
    context = TokenContext(tiny(), random_eraser(tiny(), window=(2, 8)))
    context.append_ids(ids[0])
    start = states(context.cache)
    return context, start, [context.erase_spans(span, method) for span in spans]


SPANS = [kv.Span(40, 48), kv.Span(10, 14), kv.Span(70, 76), kv.Span(20, 26)]


@given(st.permutations(range(4)), st.permutations(SPANS), st.sampled_from([0, 6, 20]), st.booleans())
def test_restoring_all_edits_in_any_order_ends_bit_for_bit_where_it_began(order, spans, repair, neutral):
    eraser = kv.KVEraser.neutral(tiny()) if neutral else None
    method = kv.Steering(eraser, repair=repair, keys=None)
    context, start, receipts = erased_context(token_ids(110), spans, method)
    for index in order:
        context.restore(receipts[index])
    assert same(states(context.cache), start)
    assert context.exact


@given(st.permutations(SPANS), st.integers(0, 2), st.sampled_from([6, 20]))
def test_restoring_an_older_edit_brings_back_nothing_of_what_a_later_one_erased(spans, which, repair):
    """Contexts that differ in the span erased last alone are the same wherever a restore or a repair has written."""
    ids = token_ids(110)
    other = ids.clone()
    other[0, spans[-1].slice] = token_ids(len(spans[-1]), seed=7)[0]
    method = kv.Steering(kv.KVEraser.neutral(tiny()), repair=repair, keys=None)
    found, written = [], []
    for these in (ids, other):
        context, _, receipts = erased_context(these, spans, method)
        before = states(context.cache)
        context.restore(receipts[which])
        now = states(context.cache)
        written.append({s for s in range(110) for a, b in zip(before, now, strict=True) if (a != b)[:, :, s].any()})
        found.append(now)
    slots = torch.tensor(
        sorted((written[0] | written[1]) - {s for span in spans for s in span if span != spans[which]})
    )
    assert set(spans[which]) <= written[0]
    clean = [slot for slot in slots.tolist() if slot < spans[-1].start]
    recomputed = [slot for slot in slots.tolist() if slot >= spans[-1].end]
    for part in (clean, recomputed):
        if part and max(part) < _first_unrepaired(receipts, spans[-1]):
            assert relative([t[:, :, part] for t in found[0]], [t[:, :, part] for t in found[1]]) < 1e-5


def _first_unrepaired(receipts, last):
    """The first slot behind the span erased last that its own edit did not recompute: it still holds what it had read."""
    repaired = {slot for run in receipts[-1].recomputed for slot in run}
    behind = [slot for slot in range(last.end, 110) if slot not in repaired]
    return behind[0] if behind and behind[0] > last.start else 110


def test_a_plain_cache_refuses_to_bring_back_what_had_read_a_later_span():
    model, ids = tiny(), token_ids(60)
    cache = prefill(model, ids)
    before = states(cache)
    method = kv.Steering(kv.KVEraser.neutral(model), repair=0)
    older = kv.erase(model, cache, ids, kv.Span(30, 36), method=method)
    newer = kv.erase(model, cache, older.token_ids(ids), kv.Span(10, 12), method=method)
    with pytest.raises(kv.RestoreError, match="had read it"):
        kv.restore(cache, older)
    kv.restore(cache, newer)
    kv.restore(cache, older)
    assert same(states(cache), before)


def test_an_edit_before_all_later_ones_is_put_back_bit_for_bit():
    model, ids = tiny(), token_ids(60)
    cache = prefill(model, ids)
    before = states(cache)
    method = kv.Steering(kv.KVEraser.neutral(model), repair=0)
    older = kv.erase(model, cache, ids, kv.Span(10, 12), method=method)
    kv.erase(model, cache, older.token_ids(ids), kv.Span(30, 36), method=method)
    kv.restore(cache, older)
    assert same([t[:, :, :30] for t in states(cache)], [t[:, :, :30] for t in before])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_restore_that_fails_while_it_recomputes_changes_nothing(monkeypatch, error):
    context, _, receipts = erased_context(token_ids(110), SPANS, kv.Steering(kv.KVEraser.neutral(tiny()), repair=6))
    before, live = states(context.cache), context.live_ids

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("kveraser.context.restoring.repair_slots", fail)
    with pytest.raises(error):
        context.restore(receipts[0])
    assert same(states(context.cache), before)
    assert context.live_ids == live
    monkeypatch.undo()
    assert context.restore(receipts[0]).tokens_recomputed
