"""Erasing inside llama.cpp, with tiny random models that transformers has as well."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from conftest import random_eraser
from kveraser.engines import llama_cpp as engine
from kveraser.engines.llama_cpp import library
from kveraser.engines.llama_cpp import model as model_module
from kveraser.engines.llama_cpp.cells import LIVE, WORK
from kveraser.engines.llama_cpp.passes import Bench
from kveraser.engines.llama_cpp.weights import gguf_fingerprint
from kveraser.errors import EngineError
from kveraser.model.fingerprint import Fingerprint
from llama_cpp_helpers import ids_of, tiny_pair, without_effect

WINDOW, REPAIR = (2, 9), 5
ERASING = ("kveraser", "delete-and-shift", "local-suffix-repair", "full-recompute")
CACHES = {
    "f32": {"keys": "f32", "values": "f32", "flash_attention": False},
    "f16": {"keys": "f16", "values": "f16"},
    "q8_0": {"keys": "q8_0", "values": "q8_0"},
    "q4_0 keys": {"keys": "q4_0", "values": "f16", "flash_attention": False},
}


class Pair:
    """One backbone and one eraser, in transformers and in llama.cpp."""

    def __init__(self, folder, family="llama", **options):
        self.file = folder / f"{family}.gguf"
        self.backbone = tiny_pair(self.file, family, **options)
        self.eraser = random_eraser(self.backbone, window=WINDOW, repair=REPAIR, choose="next")
        self.folder = self.eraser.save_pretrained(folder / f"{family}-eraser", dtype=torch.float32)
        self.model = engine.LlamaCppModel(self.file, threads=1)
        self.found = self.model.find_eraser(self.folder)

    def context(self, cache="f32", eraser=None, **options):
        return engine.LlamaCppContext(self.model, eraser or self.found, **{"length": 512, **CACHES[cache], **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama-cpp")


@pytest.fixture(scope="module")
def pair(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVERASER_CACHE", str(folder / "cache"))
        return Pair(folder)


def read(context, sizes=(30, 8, 40), seed=0):
    """Let a context read parts of so many tokens; their spans."""
    ids = ids_of(sum(sizes), seed)
    spans, at = [], 0
    for size in sizes:
        spans.append(context.append(ids[at : at + size]))
        at += size
    return spans


def bits(context):
    return context.backend.cells.read([kv.Span(0, context.backend.length)]).tobytes()


def equal(left, right):
    """Whether cells are the same; a rotation by nothing, which llama.cpp applies to all keys, may flip the sign of zeros."""
    if len(left) != len(right):
        return False
    return all({a, b} == {0, 0x80} for a, b in zip(left, right, strict=True) if a != b)


def states(context, span):
    return context.backend.cells.read([span]).tobytes()


def each_slot(context):
    return [states(context, kv.Span(slot, slot + 1)) for slot in range(context.backend.length)]


def changed(before, after):
    return {slot for slot, (a, b) in enumerate(zip(before, after, strict=True)) if not equal(a, b)}


QUESTION = ids_of(6, seed=9)


# -- the same as in transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "method", ["no-erase", *ERASING, "kveraser:repair=0", "kveraser:full_prefix=true", "kveraser:window=0,3"]
)
def test_log_probabilities_are_those_of_transformers(folder, pair, family, method, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(folder / "cache"))
    both = pair if family == "llama" else Pair(folder / f"{family}", family) if _made(folder, family) else None
    ours, theirs = both.context(), kv.ErasableContext(both.backbone, eraser=both.eraser)
    for context in (ours, theirs):
        spans = read(context)
        context.erase(spans[1], method)
        context.append(ids_of(4, seed=5))
    found = ours.logits_ids(QUESTION).log_softmax(-1)
    wanted = theirs.logits_ids(QUESTION).log_softmax(-1)
    assert (found - wanted).abs().max() < 2e-3, (found - wanted).abs().max()
    assert ours.exact == theirs.exact
    assert ours.live_ids == theirs.live_ids


def _made(folder, family):
    (folder / family).mkdir(exist_ok=True)
    return True


def test_several_spans_in_one_erase_are_those_of_transformers(pair):
    ours, theirs = pair.context(), kv.ErasableContext(pair.backbone, eraser=pair.eraser)
    for context in (ours, theirs):
        spans = read(context, (20, 5, 3, 6, 30))
        context.erase([spans[1], spans[3]])
    difference = ours.logits_ids(QUESTION).log_softmax(-1) - theirs.logits_ids(QUESTION).log_softmax(-1)
    assert difference.abs().max() < 2e-3


def test_receipts_say_the_same_as_those_of_transformers(pair):
    ours, theirs = pair.context(), kv.ErasableContext(pair.backbone, eraser=pair.eraser)
    for method in ("no-erase", *ERASING):
        found, wanted = (context.erase(read(context)[1], method) for context in (ours, theirs))
        for name in ("method", "spans", "exact", "tokens_removed", "tokens_recomputed", "removed", "steered"):
            assert getattr(found, name) == getattr(wanted, name), (method, name)


def test_the_gguf_file_has_the_fingerprint_of_the_transformers_model(folder, pair):
    assert gguf_fingerprint(pair.file, "llama") == Fingerprint.of(pair.backbone)


# -- invariants ----------------------------------------------------------------------------------------------------


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


def test_spans_stay_valid_whatever_was_erased_before_them(pair):
    context = pair.context()
    spans = read(context, (10, 4, 10, 4, 10))
    ids = context.live_ids
    context.erase(spans[0], "delete-and-shift")
    context.erase(spans[1], "kveraser:repair=0")
    context.erase(spans[3], "delete-and-shift")
    assert context.live_ids == [*ids[14:24], *ids[28:]]
    assert context.erased == (spans[0], spans[1], spans[3])
    assert context.backend.length == len(context.live_ids) + 4


def test_an_emptied_context_goes_on(pair):
    context = pair.context()
    span = context.append(ids_of(10))
    context.erase(span)
    with pytest.raises(kv.ContextError, match="empty"):
        context.generate_ids()
    fresh = pair.context()
    for each in (context, fresh):
        each.append(ids_of(5, seed=3))
    assert torch.equal(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION))


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


# -- failures leave everything as it was -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ERASING)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_forward_leaves_cells_and_ledger_as_they_were(pair, monkeypatch, method, at, error):
    context = pair.context()
    span = read(context)[1]
    before, logits = bits(context), context.logits_ids(QUESTION)
    calls, decode = [], context.backend.cells._decode

    def failing(*arguments):
        calls.append(1)
        if len(calls) > at:
            raise error("stop")
        decode(*arguments)

    monkeypatch.setattr(context.backend.cells, "_decode", failing)
    try:
        context.erase(span, method)
    except error:
        monkeypatch.setattr(context.backend.cells, "_decode", decode)
        assert equal(bits(context), before)
        assert context.erased == ()
        assert context.exact
    monkeypatch.setattr(context.backend.cells, "_decode", decode)
    if not context.erased:
        assert torch.equal(context.logits_ids(QUESTION), logits)
        context.erase(span, method)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("first", "second", "call", "bit_exact"), [(1, 3, "write", True), (3, 1, "_decode", False)])
def test_a_failing_restore_of_an_older_edit_leaves_it_erased_and_every_cell_as_it_was(
    pair, monkeypatch, first, second, call, bit_exact, error
):
    context = pair.context()
    spans = read(context, (20, 4, 20, 4, 30))
    older = context.erase(spans[first])
    context.erase(spans[second])
    before, marks, erased = bits(context), context.backend.marks, context.erased
    calls, real = [], getattr(context.backend.cells, call)

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise error("stop")
        return real(*arguments)

    monkeypatch.setattr(context.backend.cells, call, failing)
    with pytest.raises(error):
        context.restore(older)
    assert equal(bits(context), before)
    assert (context.backend.marks, context.erased) == (marks, erased)
    assert context.restore(older).bit_exact == bit_exact


def test_a_failing_append_leaves_the_context_as_it_was(pair, monkeypatch):
    context = pair.context(length=2000)
    read(context)
    before, decode, calls = bits(context), context.backend.cells._decode, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        decode(*arguments)

    monkeypatch.setattr(context.backend.cells, "_decode", failing)
    with pytest.raises(RuntimeError):
        context.append(ids_of(700))
    assert bits(context) == before
    assert len(context) == 78


BAD_ERASES = [
    (lambda c: c.erase(kv.Span(70, 90)), kv.SpanError, "ends after"),
    (lambda c: c.erase([]), kv.SpanError, "no span"),
    (lambda c: c.erase([kv.Span(1, 4), kv.Span(3, 6)]), kv.SpanError, "overlap"),
    (lambda c: c.erase("nowhere to be found"), kv.SpanError, "not in the context"),
    (lambda c: c.erase(3), TypeError, "int"),
    (lambda c: c.erase(kv.Span(1, 3), "selective-recompute"), kv.OptionError, "llama.cpp"),
    (lambda c: c.erase(kv.Span(1, 3), "forget"), kv.OptionError, "there is no"),
    (lambda c: c.erase(kv.Span(5, 9), "kveraser:window=2,0"), kv.OptionError, "local"),
    (lambda c: c.append([]), kv.ContextError, "nothing"),
    (lambda c: c.append(""), kv.ContextError, "nothing"),
    (lambda c: c.append([3, 100000]), kv.ContextError, "100000"),
    (lambda c: c.append([-1]), kv.ContextError, "-1"),
    (lambda c: c.append(ids_of(600)), kv.ContextError, "do not fit"),
    (lambda c: c.logits_ids([]), kv.ContextError, "nothing"),
    (lambda c: c.logits_ids(ids_of(600)), kv.ContextError, "do not fit"),
    (lambda c: c.generate_ids([1], max_new_tokens=600), kv.ContextError, "do not fit"),
    (lambda c: c.generate_ids([1], max_new_tokens=0), kv.OptionError, "at least 1"),
    (lambda c: c.generate_ids([1], top_p=0), kv.OptionError, "top_p"),
    (lambda c: c.backend.cells.run([1], 3, LIVE), EngineError, "gaps"),
    (lambda c: c.backend.cells.share(0, 7, kv.Span(0, 1)), EngineError, "no sequence 7"),
    (lambda c: c.backend.cells.move(LIVE, kv.Span(0, 4), -2), EngineError, "before position 0"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_ERASES)
def test_bad_input_is_named_and_changes_nothing(pair, call, error, words):
    context = pair.context()
    read(context)
    before = bits(context)
    with pytest.raises(error, match=words):
        call(context)
    assert bits(context) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "0 tokens"),
        ({"length": 10**6}, "trained on"),
        ({"keys": "bf16"}, "bf16"),
        ({"values": "q8_0", "flash_attention": False}, "flash attention"),
    ],
)
def test_impossible_caches_are_refused(pair, options, words):
    with pytest.raises(kv.OptionError, match=words):
        engine.LlamaCppContext(pair.model, pair.found, **options)


def test_heads_that_no_block_divides_refuse_quantised_caches(folder, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(folder / "cache"))
    file = folder / "odd.gguf"
    tiny_pair(file, head=16)
    with pytest.raises(kv.OptionError, match="multiple of 32"):
        engine.LlamaCppContext(engine.LlamaCppModel(file, threads=1), length=64, keys="q8_0")


def test_quantised_keys_that_llama_cpp_cannot_rotate_are_not_moved(folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(folder / "cache"))
    (folder / "narrow").mkdir()
    narrow = Pair(folder / "narrow", head=32)
    context = narrow.context("q8_0")
    span = read(context)[1]
    before = bits(context)
    for method in ("kveraser", "delete-and-shift"):
        with pytest.raises(kv.OptionError, match="cannot be moved"):
            context.erase(span, method)
        assert bits(context) == before
    context.erase(span, "kveraser:repair=0")
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with pytest.raises(kv.OptionError, match="LLAMA_ATTN_ROT_DISABLE"):
        context = pair.context("q8_0")
        context.erase(read(context)[1], "delete-and-shift")


def test_moving_quantised_keys_makes_the_whole_cache_approximate(pair):
    context = pair.context("q8_0")
    span = read(context)[1]
    context.erase(span, "delete-and-shift")
    assert context.backend.marks.approximate_from == 0
    receipt = context.erase(kv.Span(60, 63), "full-recompute")
    assert receipt.tokens_recomputed == 67


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        ("llama_model_n_swa", 512, "sliding window"),
        ("llama_model_is_recurrent", True, "recurrent"),
        ("llama_model_is_hybrid", True, "recurrent"),
        ("llama_model_has_encoder", True, "encoder"),
        ("llama_model_rope_type", 8, "rotary"),
    ],
)
def test_models_whose_cache_cannot_be_edited_are_refused_by_name(pair, monkeypatch, function, value, words):
    monkeypatch.setattr(library.lib, function, lambda _: value)
    with pytest.raises(kv.UnsupportedCacheError, match=words):
        engine.LlamaCppModel(pair.file)


def test_files_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(kv.BackboneError, match="no GGUF file"):
        engine.LlamaCppModel(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(kv.BackboneError, match="cannot load"):
        engine.LlamaCppModel(tmp_path / "bad.gguf")
    with pytest.raises(kv.BackboneError):
        gguf_fingerprint(tmp_path / "bad.gguf", "llama")


def test_an_eraser_of_another_backbone_is_refused(folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(folder / "cache"))
    with pytest.raises(kv.EraserMismatchError, match="no eraser ships"):
        pair.model.find_eraser()
    file = folder / "wide.gguf"
    tiny_pair(file, layers=2)
    with pytest.raises(kv.EraserMismatchError, match="num_hidden_layers"):
        engine.LlamaCppModel(file, threads=1).find_eraser(pair.folder)
    with pytest.raises(kv.EraserMismatchError, match="cannot load"):
        engine.LlamaCppModel(file, threads=1).load_adapter(pair.found)


def test_a_fine_tune_of_the_backbone_needs_a_word(folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(folder / "cache"))
    fingerprint = replace(pair.found.config.fingerprint, weights=[0.5] * 32)
    monkeypatch.setattr(model_module, "gguf_fingerprint", lambda *_: fingerprint)
    with pytest.raises(kv.EraserMismatchError, match="check_weights"):
        pair.model.find_eraser(pair.folder)
    assert pair.model.find_eraser(pair.folder, check_weights=False).rank == 4


def test_an_exported_eraser_is_kept_and_a_damaged_one_made_again(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    first = pair.model.find_eraser(pair.folder)
    stamp = first.file.stat().st_mtime_ns
    assert pair.model.find_eraser(pair.folder).file.stat().st_mtime_ns == stamp
    first.file.write_bytes(b"GGUF?")
    assert pair.model.find_eraser(pair.folder).config == first.config


def test_a_library_with_other_defaults_is_not_trusted(monkeypatch):
    parameters = library.lib.llama_context_default_params()
    parameters.n_ubatch = 77
    monkeypatch.setattr(library.lib, "llama_context_default_params", lambda: parameters)
    with pytest.raises(EngineError, match="n_ubatch is 77"):
        library.check_defaults()


# -- running ---------------------------------------------------------------------------------------------------------


def test_looking_ahead_leaves_the_context_as_it_is(pair):
    context = pair.context()
    read(context)
    before = bits(context)
    context.logits_ids(QUESTION)
    context.logits_ids([], from_last=True)
    context.generate_ids(QUESTION, max_new_tokens=5)
    context.generate_ids(max_new_tokens=5)
    assert bits(context) == before


def test_a_kept_answer_is_what_appending_it_gives(pair):
    kept, appended = pair.context(), pair.context()
    read(kept), read(appended)
    answer = kept.generate_ids(QUESTION, max_new_tokens=5, keep=True)
    appended.append([*QUESTION, *answer])
    assert kept.live_ids == appended.live_ids
    assert torch.allclose(kept.logits_ids(QUESTION), appended.logits_ids(QUESTION), atol=2e-3)
    more = kept.generate_ids(max_new_tokens=3, keep=True)
    assert kept.live_ids[-3:] == more


def test_the_last_token_runs_again_for_a_question_that_was_cached(pair):
    context = pair.context()
    read(context)
    row = context.logits_ids([], from_last=True)[0]
    assert context.generate_ids(max_new_tokens=1) == [int(row.argmax())]
    both = context.logits_ids([5, 6], from_last=True)
    assert torch.allclose(both[0], row, atol=1e-3)
    assert both.shape == (3, pair.model.vocabulary)


def test_sampling_is_repeatable_by_its_seed(pair):
    context = pair.context()
    read(context)
    sampled = [context.generate_ids(max_new_tokens=8, temperature=3.0, top_p=0.95, seed=n) for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_answers_stop_at_an_end_token_and_where_a_criterion_says(pair):
    context = pair.context()
    read(context)
    greedy = context.generate_ids(max_new_tokens=6)
    assert context.generate_ids(max_new_tokens=6, stopping_criteria=[lambda ids, _: ids.shape[1] >= 3]) == greedy[:2]


def test_text_goes_to_ids_and_back(pair):
    context = pair.context()
    span = context.append("the cat and the hat")
    context.append(" then came home")
    assert context.text_of(span) == "the cat and the hat"
    assert context.locate("hat").end == span.end
    context.erase(" the hat")
    assert context.text == "the cat and then came home"
    with pytest.raises(kv.SpanError, match="times"):
        context.erase("th")


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_a_saved_context_goes_on_as_if_it_had_never_been_saved(pair, tmp_path, cache):
    context = pair.context(cache)
    spans = read(context, (20, 5, 10, 6, 30))
    context.erase(spans[3], "delete-and-shift")
    receipt = context.erase(spans[1])
    logits = context.logits_ids(QUESTION)
    context.save(tmp_path / "session")
    loaded = engine.LlamaCppContext.load(tmp_path / "session", pair.model, pair.found)
    assert bits(loaded) == bits(context)
    assert torch.allclose(loaded.logits_ids(QUESTION), logits, atol=3e-2)  # the same cells, summed up in another order
    assert (loaded.live_ids, loaded.erased, loaded.exact) == (context.live_ids, context.erased, context.exact)
    report = loaded.restore(receipt)
    assert not report.bit_exact
    assert loaded.erased == (spans[3],)


def test_saving_again_leaves_one_file_of_cells(pair, tmp_path):
    context = pair.context()
    read(context)
    context.save(tmp_path)
    context.append(ids_of(3))
    context.save(tmp_path)
    assert len(list(tmp_path.glob("cells-*"))) == 1
    assert len(engine.LlamaCppContext.load(tmp_path, pair.model, pair.found)) == 81


@pytest.mark.parametrize("damage", ["cells", "index", "missing", "model", "engine", "path", "format"])
def test_damaged_sessions_are_refused(pair, tmp_path, damage):
    import hashlib

    context = pair.context()
    read(context)
    context.save(tmp_path)
    index = tmp_path / "session.json"
    envelope = json.loads(index.read_text())
    if damage == "cells":
        file = next(tmp_path.glob("cells-*"))
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "missing":
        next(tmp_path.glob("cells-*")).unlink()
    elif damage == "index":
        index.write_text(index.read_text().replace('"erased": []', '"erased": [[1, 2, false]]'))
    elif damage == "format":
        index.write_text(json.dumps({**envelope, "format": 9}))
    else:
        body = envelope["session"]
        changes = {"model": {"model": {**body["model"], "parameters": 1}}, "engine": {"engine": "other"},
                   "path": {"cells": {**body["cells"], "file": "../x"}}}  # fmt: skip
        body = {**body, **changes[damage]}
        sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        index.write_text(json.dumps({"format": 1, "sha256": sha, "session": body}))
    with pytest.raises(kv.SessionFileError):
        engine.LlamaCppContext.load(tmp_path, pair.model, pair.found)


def test_a_session_is_saved_to_a_folder(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kv.SessionFileError, match="is a file"):
        pair.context().save(tmp_path / "file")
