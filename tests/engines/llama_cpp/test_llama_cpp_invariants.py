"""What an erase in llama.cpp writes and what it leaves, bit for bit, in caches of every type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.engines.llama_cpp.cells import LIVE, WORK
from kveraser.engines.llama_cpp.passes import Bench
from llama_cpp_helpers import CACHES, ERASING, QUESTION, REPAIR, bits, equal, ids_of, read, states, without_effect


def test_a_zero_adapter_with_the_full_prefix_changes_not_a_bit(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    zero = pair.model.find_eraser(without_effect(pair.folder, tmp_path / "zero"))
    context = pair.context(eraser=zero)
    span = read(context)[1]
    before, logits = bits(context), context.logits_ids(QUESTION)
    context.erase(span, "kveraser:full_prefix=true,repair=0")
    assert bits(context) == before
    assert torch.equal(context.logits_ids(QUESTION), logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", ERASING)
def test_restore_is_bit_exact(pair, cache, method):
    context = pair.context(cache)
    span = read(context)[1]
    before, logits = bits(context), context.logits_ids(QUESTION)
    receipt = context.erase(span, method)
    assert not torch.equal(context.logits_ids(QUESTION), logits)
    report = context.restore(receipt)
    assert report.bit_exact
    assert report.exact
    assert equal(bits(context), before)
    assert torch.equal(context.logits_ids(QUESTION), logits)


@pytest.mark.parametrize("cache", CACHES)
def test_steering_without_repair_writes_the_spans_cells_only(pair, cache):
    context = pair.context(cache)
    prefix, span, suffix = read(context)
    before = [states(context, part) for part in (prefix, span, suffix)]
    receipt = context.erase(span, "kveraser:repair=0")
    after = [states(context, part) for part in (prefix, span, suffix)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert receipt.bytes_written == 8 * context.backend.cells.bytes_per_token
    assert receipt.positions_kept


@pytest.mark.parametrize("cache", CACHES)
def test_repair_changes_just_so_many_cells_more_and_no_other_bit(pair, cache):
    context = pair.context(cache)
    prefix, span, suffix = read(context)
    behind = kv.Span(suffix.start, suffix.start + REPAIR)
    rest = kv.Span(behind.end, suffix.end)
    before = [states(context, part) for part in (prefix, behind, rest)]
    context.erase(span)
    after = [states(context, part) for part in (prefix, behind, rest)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert context.backend.marks.approximate_from == span.start


@pytest.mark.parametrize("cache", CACHES)
def test_a_span_too_long_for_the_bench_is_steered_in_the_cache_itself(pair, cache, monkeypatch):
    beside, within = pair.context(cache), pair.context(cache)
    for context, longest in ((beside, 448), (within, 4)):
        monkeypatch.setattr(Bench, "SPAN", longest)
        span = read(context)[1]
        before = bits(context)
        receipt = context.erase(span)
        context.logits = context.logits_ids(QUESTION).log_softmax(-1)
        assert context.restore(receipt).bit_exact
        assert equal(bits(context), before)
    tolerance = {"f32": 1e-3, "f16": 3e-2}.get(cache, 2)
    assert (beside.logits - within.logits).abs().max() < tolerance


@pytest.mark.parametrize("cache", CACHES)
def test_full_recompute_equals_a_fresh_context(pair, cache):
    context, fresh = pair.context(cache), pair.context(cache)
    spans = read(context)
    assert context.erase(spans[1], "full-recompute").exact
    fresh.append(context.live_ids[:30])
    fresh.append(context.live_ids[30:])
    assert torch.equal(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION))


def test_full_recompute_mends_what_earlier_erases_left(pair):
    context, fresh = pair.context(), pair.context()
    spans = read(context, (20, 5, 10, 6, 30))
    context.erase(spans[1])
    context.erase(spans[3], "full-recompute")
    assert context.exact
    fresh.append(context.live_ids)
    assert torch.allclose(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION), atol=1e-3)


@pytest.mark.parametrize("method", ERASING)
def test_a_span_that_ends_the_context_is_cropped(pair, method):
    context = pair.context()
    prefix, _, suffix = read(context)
    before = states(context, kv.Span(prefix.start, suffix.start))
    receipt = context.erase(suffix, method)
    assert receipt.exact
    assert receipt.tokens_recomputed == 0
    assert bits(context) == before
    context.append(ids_of(3))
    assert len(context.live_ids) == 41


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 20)),
    st.tuples(st.sampled_from(["kveraser", "kveraser:repair=0", *ERASING]), st.integers(0, 10**6)),
    st.tuples(st.just("restore"), st.integers(0, 10**6)),
    st.tuples(st.just("look"), st.just(0)),
)


@settings(max_examples=40)
@given(st.lists(OPERATION, max_size=9))
def test_any_sequence_of_edits_keeps_ledger_and_cells_in_step(pair, operations):
    context = pair.context()
    live = context.append(ids_of(12)).end
    everything = dict(enumerate(ids_of(12)))
    gone: dict[str, tuple] = {}
    for number, (name, value) in enumerate(operations):
        if name == "append":
            new = ids_of(value, seed=number + 1)
            span = context.append(new)
            everything.update(zip(span, new, strict=True))
            live = span.end
        elif name == "restore":
            if gone:
                key = sorted(gone)[value % len(gone)]
                context.restore(gone.pop(key))
        elif name == "look":
            if context.live_ids:
                before = bits(context)
                context.generate_ids(max_new_tokens=2)
                assert bits(context) == before
        else:
            runs = context._ledger.live()
            if not runs:
                continue
            run = runs[value % len(runs)]
            start = run.start + value % len(run)
            receipt = context.erase(kv.Span(start, min(start + 1 + value % 7, run.end)), name)
            gone[receipt.id] = receipt
        erased = {position for receipt in gone.values() for span in receipt.spans for position in span}
        assert context.live_ids == [everything[i] for i in range(live) if i not in erased]
        assert context.backend.cells.end(LIVE) == context.backend.length
        assert context.backend.cells.end(WORK) == 0
    if context.live_ids and context.exact:
        fresh = pair.context()
        fresh.append(context.live_ids)
        assert torch.allclose(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION), atol=2e-3)
