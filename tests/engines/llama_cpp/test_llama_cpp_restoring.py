"""Undoing erases in llama.cpp, in any order: bits come back, but never of what had read something erased since."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.engines.llama_cpp.passes import Bench
from llama_cpp_helpers import CACHES, QUESTION, REPAIR, bits, changed, each_slot, equal, ids_of, read, states


@pytest.mark.parametrize("appended", [0, 7])
def test_restoring_in_another_order_gives_what_was_there(pair, appended):
    context, untouched = pair.context(), pair.context()
    spans = read(context, (30, 4, 30, 4, 30))
    read(untouched, (30, 4, 30, 4, 30))
    first, second = context.erase(spans[1]), context.erase(spans[3])
    if appended:
        for each in (context, untouched):
            each.append(ids_of(appended, seed=4))
    context.restore(first)
    report = context.restore(second)
    assert report.exact
    assert torch.allclose(context.logits_ids(QUESTION), untouched.logits_ids(QUESTION), atol=2e-3)
    if not appended:
        assert equal(bits(context), bits(untouched))


def test_an_older_edit_whose_repair_a_later_one_touched_is_restored_by_recomputing(pair):
    context = pair.context()
    spans = read(context, (30, 4, 2, 4, 30))
    first = context.erase(spans[1])
    context.erase(spans[3])
    report = context.restore(first)
    assert not report.bit_exact
    assert context.erased == (spans[3],)
    assert report.exact


def test_an_older_edit_does_not_bring_back_what_a_later_one_rewrote_far_behind_its_span(pair):
    read_b, untold = pair.context(), pair.context()  # they differ in the tokens of B only
    c, a, b = kv.Span(13, 40), kv.Span(45, 47), kv.Span(10, 12)
    for context in (read_b, untold):
        ids = ids_of(78)
        if context is untold:
            ids[b.slice] = ids_of(2, seed=8)
        context.append(ids)
        context.erase(c, "kveraser:repair=8")
        receipt = context.erase(a, "kveraser:repair=8")
        context.erase(b, "kveraser:repair=8")  # repairs [12, 13), [40, 45) and [47, 49)
        context.report = context.restore(receipt)
        assert context.erased == (b, c)
    assert (read_b.report.bit_exact, read_b.report.exact) == (False, True)
    assert bits(read_b) == bits(untold)
    fresh = pair.context()
    fresh.append(read_b.live_ids)
    assert torch.allclose(read_b.logits_ids(QUESTION), fresh.logits_ids(QUESTION), atol=2e-3)


def test_states_that_had_read_a_span_are_not_put_back_once_it_is_erased(pair):
    context = pair.context()
    spans = read(context, (10, 2, 50, 2, 14))
    older = context.erase(spans[3], "kveraser:repair=0")
    context.erase(spans[1], "kveraser:repair=0")  # far before it, and writes nothing that the older one kept
    report = context.restore(older)
    assert (report.bit_exact, report.exact) == (False, True)
    assert context.erased == (spans[1],)
    assert context.backend.length == 76


def test_an_older_edit_is_put_back_when_the_later_ones_are_behind_it_or_erased_nothing(pair):
    context = pair.context()
    spans = read(context, (10, 2, REPAIR, 2, 14))
    before = states(context, kv.Span(0, 17))
    older = context.erase(spans[1])
    context.erase(spans[3])  # begins right where the repair of the older one ends
    context.erase(spans[4], "no-erase")
    assert context.restore(older).bit_exact
    assert states(context, kv.Span(0, 17)) == before


SOME = st.tuples(st.integers(0, 75), st.integers(1, 9), st.sampled_from([0, 3, 8]))


@settings(max_examples=40)
@given(st.lists(SOME, min_size=1, max_size=4), SOME, st.permutations(range(4)))
def test_no_restore_brings_back_a_state_that_had_read_what_was_erased_later(pair, older, last, order):
    both = pair.context(), pair.context()  # they differ in the tokens of the last span only
    taken = kv.Span(last[0], min(last[0] + last[1], 77))
    results = []
    for number, context in enumerate(both):
        ids = ids_of(78)
        if number:
            ids[taken.slice] = ids_of(len(taken), seed=8)
        context.append(ids)
        receipts = []
        for start, size, repair in older:
            span = kv.Span(start, min(start + size, 77))
            if not any(span.overlaps(other) for other in (*context.erased, taken)):
                receipts.append(context.erase(span, f"kveraser:repair={repair}"))
        before = each_slot(context)
        context.erase(taken, f"kveraser:repair={last[2]}")
        clean = sorted(changed(before, each_slot(context)) - {*taken})  # what was repaired behind it
        found = []
        for index in order:
            if index < len(receipts):
                context.restore(receipts[index])
                clean += [position for span in receipts[index].spans for position in span]
                slots = [context._ledger.to_cache(position) for position in clean]
                found.append([states(context, kv.Span(slot, slot + 1)) for slot in slots])
        results.append(found)
    assert results[0] == results[1]


@pytest.mark.parametrize("longest", [448, 4])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", ["no-erase", "kveraser", "kveraser:repair=0"])
def test_the_mark_of_an_edit_records_every_slot_that_it_wrote(pair, monkeypatch, cache, method, longest):
    monkeypatch.setattr(Bench, "SPAN", longest)
    context = pair.context(cache)
    spans = read(context, (20, 5, 2, 6, 3, 5, 20))
    context.erase(spans[3])
    before = each_slot(context)
    context.erase([spans[1], spans[5]], method)
    mark = context.backend.marks.edits[-1]
    found, written = changed(before, each_slot(context)), {slot for span in mark.written for slot in span}
    assert bool(written) == (method != "no-erase")
    assert written <= found
    assert written == found or not mark.in_place  # moving quantised keys may round all of them again


def test_nothing_is_kept_when_undo_is_not_wanted_and_restore_recomputes(pair):
    context = pair.context()
    span = read(context)[1]
    logits = context.logits_ids(QUESTION)
    receipt = context.erase(span, undo=False)
    assert receipt.undo is None
    report = context.restore(receipt)
    assert (report.bit_exact, report.exact) == (False, True)
    assert torch.allclose(context.logits_ids(QUESTION), logits, atol=2e-3)
    with pytest.raises(kv.RestoreError, match="before"):
        context.restore(receipt)
