"""A live context of ids behaves like a list of tokens of which some are erased."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kveraser as kv
from conftest import prefill, random_eraser, relative, same, states, tiny, token_ids
from kveraser.context import TokenContext

METHODS = [
    *(name for name in kv.methods() if name != "no-erase"),
    "kveraser:repair=6",
    "attention-guided-repair:tokens=5",
]


class ContextMachine(RuleBasedStateMachine):
    """Random appends, erases, restores, repairs and purges against the plainest model: a list of flags."""

    @initialize(seed=st.integers(0, 5), window=st.sampled_from([None, (2, 5)]))
    def start(self, seed, window):
        self.model = tiny()
        self.eraser = random_eraser(self.model, window=window)
        self.context = TokenContext(self.model, self.eraser)
        self.ids, self.alive, self.receipts, self.purged = [], [], [], []
        self.append(12, seed)

    @rule(count=st.integers(1, 9), seed=st.integers(0, 50))
    def append(self, count, seed):
        new = token_ids(count, seed=seed)[0]
        span = self.context.append_ids(new)
        assert span == kv.Span(len(self.ids), len(self.ids) + count)
        self.ids += new.tolist()
        self.alive += [True] * count

    @rule(at=st.floats(0, 1), size=st.integers(1, 6), method=st.sampled_from(METHODS))
    def erase(self, at, size, method):
        start = int(at * (len(self.ids) - 1))
        span = kv.Span(start, min(start + size, len(self.ids)))
        if not all(self.alive[span.slice]):
            before = states(self.context.cache)
            with pytest.raises(kv.SpanError, match="erased already"):
                self.context.erase_spans(span, method)
            assert same(states(self.context.cache), before)
            return
        receipt = self.context.erase_spans(span, method)
        assert receipt.spans == (span,)
        assert receipt.exact == self.context.exact
        assert receipt.exact or receipt.method != "full-recompute"
        self.receipts.append(receipt)
        self.alive[span.slice] = [False] * len(span)

    @precondition(lambda self: self.receipts)
    @rule(index=st.integers(0, 9))
    def restore(self, index):
        receipt = self.receipts.pop(index % len(self.receipts))
        self.context.restore(receipt)
        for span in receipt.spans:
            self.alive[span.slice] = [True] * len(span)
        with pytest.raises(kv.RestoreError):
            self.context.restore(receipt)

    @rule(chunks=st.sampled_from([None, 1]))
    def repair(self, chunks):
        progress = self.context.repair(chunk=8, max_chunks=chunks)
        assert progress.finished == self.context.exact

    @precondition(lambda self: self.receipts)
    @rule(index=st.integers(0, 9))
    def purge(self, index):
        receipt = self.receipts.pop(index % len(self.receipts))
        self.context.purge(receipt)
        assert self.context.exact
        for span in receipt.spans:
            assert (self.context._ids.view[span.slice] == -1).all()
        with pytest.raises(kv.RestoreError, match="purge"):
            self.context.restore(receipt)

    @rule(method=st.sampled_from(["full-recompute"]))
    def look(self, method):
        before = states(self.context.cache)
        self.context.logits_ids([5, 6])
        self.context.generate_ids([7], max_new_tokens=2)
        if any(self.alive):
            self.context.generate_ids(max_new_tokens=2)
        assert same(states(self.context.cache), before)

    @invariant()
    def agrees(self):
        context = self.context
        live = [token for token, alive in zip(self.ids, self.alive, strict=True) if alive]
        assert context.live_ids == live
        assert len(context) == len(self.ids)
        assert len(context.token_ids) == context.cache.get_seq_length()
        assert not set(context.token_ids.tolist()) - set(live)
        if context.exact and live:
            assert context.token_ids.tolist() == live
            assert relative(states(context.cache), states(prefill(self.model, torch.tensor([live])))) < 1e-4


ContextMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=14, deadline=None)
TestContext = ContextMachine.TestCase


def filled(*sizes, **options):
    model = tiny()
    context = TokenContext(model, random_eraser(model, **options))
    spans = [context.append_ids(token_ids(size, seed=index)[0]) for index, size in enumerate(sizes)]
    return context, spans


@pytest.mark.parametrize("method", METHODS)
def test_spans_stay_valid_when_a_method_moves_the_suffix(method):
    context, (_, first, _, second, _) = filled(10, 6, 8, 5, 9)
    context.erase_spans(first, method)
    receipt = context.erase_spans(second, method)
    assert receipt.span == second
    assert context.erased == (first, second)


def test_restoring_a_span_that_had_repaired_another_erased_since_recomputes():
    context, (_, first, second, _) = filled(10, 6, 4, 20, repair=8)
    receipt = context.erase_spans(first)
    context.erase_spans(second)
    report = context.restore(receipt)
    assert not report.bit_exact
    assert report.tokens_recomputed == 8  # what stands behind the second one: it had been recomputed without the first
    assert context.erased == (second,)


@pytest.mark.parametrize("later", METHODS)
def test_an_id_that_stood_in_for_erased_ones_goes_when_its_token_is_erased(later):
    context, spans = filled(10, 3, 4, 3, 9)
    context.erase_spans(spans[2])
    assert set(context.token_ids[13:17].tolist()) == {int(context._ids.view[12])}
    context.erase_spans(spans[1], later)
    assert len(context.token_ids) == context.cache.get_seq_length()
    context.erase_spans(spans[0], "kveraser")
    live = context._ids.view[17:].tolist()
    assert set(context.token_ids.tolist()) <= set(live)
    assert context.live_ids == live


def test_several_spans_go_in_one_call():
    context, spans = filled(10, 6, 8, 5, 9)
    before = states(context.cache)
    receipt = context.erase_spans([spans[3], spans[1]])
    assert receipt.spans == (spans[1], spans[3])
    assert receipt.tokens_removed == 11
    assert context.restore(receipt).bit_exact
    assert same(states(context.cache), before)


def test_spans_that_meet_only_because_another_is_gone_are_erased_together():
    context, spans = filled(10, 4, 4, 4, 9)
    context.erase_spans(spans[2], "delete-and-shift")
    receipt = context.erase_spans([spans[1], spans[3]], "full-recompute")
    assert receipt.spans == (spans[1], spans[3])
    assert context.exact


def test_repair_ends_bit_equal_to_full_recomputation_with_the_same_chunks():
    repaired, spans = filled(10, 6, 40, 5, 30)
    exact, _ = filled(10, 6, 40, 5, 30)
    repaired.erase_spans(spans[1])
    repaired.erase_spans(spans[3], "kveraser")
    exact.erase_spans([spans[1], spans[3]], kv.FullRecompute(chunk=16))
    seen = []
    assert repaired.repair(chunk=16, progress=seen.append).finished
    assert [state.done for state in seen] == [16, 32, 48, 64, 70]
    assert same(states(repaired.cache), states(exact.cache))


def test_repair_goes_on_in_slices_while_the_context_is_used():
    context, spans = filled(10, 6, 40)
    context.erase_spans(spans[1])
    assert not context.repair(chunk=8, max_chunks=2).finished
    answer = context.generate_ids([5, 6], max_new_tokens=3)
    context.append_ids([9, 9, 9])
    assert context.repair(chunk=8, max_chunks=2).done == 32
    assert context.repair(chunk=8).finished
    assert context.exact
    assert len(answer) <= 3
    fresh = prefill(context.model, torch.tensor([context.live_ids]))
    assert relative(states(context.cache), states(fresh)) < 1e-5


def test_an_interrupted_repair_loses_nothing():
    context, spans = filled(10, 6, 40)
    context.erase_spans(spans[1])
    before = states(context.cache)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        context.repair(chunk=8, progress=stop)
    assert same(states(context.cache), before)
    assert context.repair(chunk=8, max_chunks=1).done == 16


def test_old_states_live_as_long_as_the_receipt():
    context, spans = filled(10, 6, 40)
    receipt = context.erase_spans(spans[1])
    undo = weakref.ref(receipt.undo)
    known = context.receipts[0]
    assert known.undo is undo()
    del receipt, known
    gc.collect()
    assert undo() is None
    report = context.restore(context.receipts[0])
    assert not report.bit_exact
    assert report.exact
    assert report.tokens_recomputed == 46


def test_an_erase_that_is_interrupted_leaves_ledger_and_cache_as_they_were():
    context, spans = filled(10, 6, 40)
    before, ids = states(context.cache), context.token_ids

    def stop(*_):
        raise KeyboardInterrupt

    for method in ("kveraser", "full-recompute", "local-suffix-repair"):
        hook = context.model.model.layers[2].register_forward_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                context.erase_spans(spans[1], method)
        finally:
            hook.remove()
        assert same(states(context.cache), before)
        assert torch.equal(context.token_ids, ids)
        assert context.erased == ()
        assert context.receipts == ()


@pytest.mark.parametrize("action", ["append", "generate", "logits"])
def test_running_ahead_that_is_interrupted_leaves_the_context_as_it_was(action):
    context, _ = filled(10, 6)
    before = states(context.cache)
    calls = {
        "append": lambda: context.append_ids([5, 6, 7]),
        "generate": lambda: context.generate_ids([5, 6, 7], max_new_tokens=4, keep=True),
        "logits": lambda: context.logits_ids([5, 6, 7]),
    }

    def stop(*_):
        raise KeyboardInterrupt

    hook = context.model.model.layers[1].register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            calls[action]()
    finally:
        hook.remove()
    assert same(states(context.cache), before)
    assert len(context) == 16


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


def test_keeping_what_was_generated_equals_appending_it():
    kept, _ = filled(12)
    answer = kept.generate_ids([5, 6], max_new_tokens=6, keep=True)
    assert kept.live_ids[-len(answer) - 2 :] == [5, 6, *answer]
    assert kept.cache.get_seq_length() == len(kept)
    assert relative(states(kept.cache), states(prefill(kept.model, torch.tensor([kept.live_ids])))) < 1e-5
    again, _ = filled(12)
    assert again.generate_ids([5, 6], max_new_tokens=6, keep=True, num_beams=2)
    assert again.exact


def test_logits_are_those_of_a_fresh_forward():
    context, _ = filled(12)
    with torch.no_grad():
        expected = context.model(torch.tensor([[*context.live_ids, 5, 6]])).logits[0].float()
    assert torch.allclose(context.logits_ids([5, 6]), expected[-2:], atol=1e-4)
    assert torch.allclose(context.logits_ids([5, 6], from_last=True), expected[-3:], atol=1e-4)
    assert context.logits_ids([5]).dtype == torch.float32


def test_an_emptied_context_needs_new_text():
    context, spans = filled(12)
    receipt = context.erase_spans(spans[0])
    assert receipt.exact
    assert context.live_ids == []
    for call in (lambda: context.generate_ids(), lambda: context.logits_ids([], from_last=True)):
        with pytest.raises(kv.ContextError, match="empty"):
            call()
    context.append_ids([5, 6, 7])
    assert context.live_ids == [5, 6, 7]
    assert context.generate_ids(max_new_tokens=2)
    report = context.restore(receipt)
    assert report.tokens_recomputed == 3
    assert len(context.live_ids) == 15


@pytest.mark.parametrize(("ids", "word"), [([], "no tokens"), ([5, 500], "500"), ([-1], "-1")])
def test_ids_that_the_model_does_not_have_are_refused(ids, word):
    context, _ = filled(12)
    with pytest.raises(kv.ContextError, match=word):
        context.append_ids(ids)
    assert len(context) == 12


def test_a_receipt_of_another_context_is_refused():
    context, spans = filled(12, 5, 9)
    other, _ = filled(12, 5, 9)
    receipt = context.erase_spans(spans[1])
    with pytest.raises(kv.RestoreError, match="another context"):
        other.restore(receipt)


def test_no_erase_leaves_the_context_alone():
    context, spans = filled(12, 5, 9)
    before = states(context.cache)
    receipt = context.erase_spans(spans[1], "no-erase")
    assert not receipt.exact
    assert context.erased == ()
    assert same(states(context.cache), before)
    with pytest.raises(kv.RestoreError, match="nothing to purge"):
        context.purge(receipt)
    assert context.restore(receipt).bit_exact
