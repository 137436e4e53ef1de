"""A live context of ids behaves like a list of tokens of which some are erased."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kveraser as kv
from conftest import same, token_ids
from kinds import EVERY_KIND, Kind
from kveraser.cache import Can
from kveraser.context import Drawing

pytestmark = pytest.mark.parametrize("kind", EVERY_KIND)


class ContextMachine(RuleBasedStateMachine):
    """Random appends, erases, replacements, restores, repairs and purges against the plainest model: a list of positions in the order of
    the cache, and a flag for each."""

    kind: Kind

    @initialize(seed=st.integers(0, 5), window=st.sampled_from([None, (2, 5)]))
    def start(self, seed, window):
        self.context = self.kind.context(window=window)
        self.ids, self.alive, self.receipts, self.order = [], [], [], []
        self.append(12, seed)

    @rule(count=st.integers(1, 9), seed=st.integers(0, 50))
    def append(self, count, seed):
        new = token_ids(count, seed=seed)[0]
        span = self.context.append_ids(new)
        assert span == kv.Span(len(self.ids), len(self.ids) + count)
        self.enter(new, len(self.order))

    def enter(self, new, at):
        positions = list(range(len(self.ids), len(self.ids) + len(new)))
        self.order[at:at] = positions
        self.ids += new.tolist()
        self.alive += [True] * len(new)

    @rule(at=st.floats(0, 1), size=st.integers(1, 6), which=st.integers(0, 50))
    def erase(self, at, size, which):
        self.edit(at, size, which, None)

    @rule(at=st.floats(0, 1), size=st.integers(1, 6), which=st.integers(0, 50), count=st.integers(1, 8))
    def replace(self, at, size, which, count):
        self.edit(at, size, which, token_ids(count, seed=51 + which)[0])

    def edit(self, at, size, which, new):
        """Erase what is at some place, or replace it."""
        method = self.kind.methods[which % len(self.kind.methods)]
        start = int(at * (len(self.ids) - 1))
        span = kv.Span(start, min(start + size, len(self.ids)))
        if not all(self.alive[span.slice]):
            before = self.kind.states(self.context)
            with pytest.raises(kv.SpanError, match="erased already"):
                self.context.erase_spans(span, method)
            assert same(self.kind.states(self.context), before)
            return
        if new is None:
            receipt = self.context.erase_spans(span, method)
        elif self.ids[span.slice] == new.tolist():
            return
        else:
            receipt = self.context.replace_spans(span, new, method)
            self.enter(new, min(map(self.order.index, span)))
            assert self.context.ids_of(receipt.replacement) == new.tolist()
        assert sorted(position for part in receipt.spans for position in part) == list(span)
        assert receipt.exact == self.context.exact
        assert receipt.exact or receipt.method != "full-recompute"
        self.receipts.append(receipt)
        self.alive[span.slice] = [False] * len(span)

    @precondition(lambda self: self.receipts)
    @rule(index=st.integers(0, 9))
    def restore(self, index):
        receipt = self.receipts[index % len(self.receipts)]
        put = [position for span in receipt.replacements for position in span]
        if not all(self.alive[position] for position in put):
            with pytest.raises(kv.RestoreError, match="restore that one first"):
                self.context.restore(receipt)
            return
        self.receipts.remove(receipt)
        self.context.restore(receipt)
        for position in put:
            self.alive[position] = False
            self.order.remove(position)
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
        before = self.kind.states(self.context)
        self.context.logits_ids([5, 6])
        self.context.generate_ids([7], max_new_tokens=2)
        if any(self.alive):
            self.context.generate_ids(max_new_tokens=2)
        assert same(self.kind.states(self.context), before)

    @invariant()
    def agrees(self):
        context = self.context
        live = [self.ids[position] for position in self.order if self.alive[position]]
        assert context.live_ids == live
        assert len(context) == len(self.ids)
        assert len(context.token_ids) == context.backend.length
        assert not set(context.token_ids.tolist()) - set(live)
        if context.exact and live:
            assert context.token_ids.tolist() == live
            assert self.kind.off(context) < self.kind.tolerance


def test_any_sequence_of_operations_does_what_a_list_would(kind):
    machine = type("Machine", (ContextMachine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=14, deadline=None))


def filled(kind, *sizes, **options):
    context = kind.context(**options)
    spans = [context.append_ids(token_ids(size, seed=index)[0]) for index, size in enumerate(sizes)]
    return context, spans


def test_spans_stay_valid_when_a_method_moves_the_suffix(kind):
    for method in kind.methods:
        context, (_, first, _, second, _) = filled(kind, 10, 6, 8, 5, 9)
        context.erase_spans(first, method)
        receipt = context.erase_spans(second, method)
        assert receipt.span == second
        assert context.erased == (first, second)


def test_a_method_that_the_backend_cannot_do_is_refused_by_name_and_nothing_changes(kind):
    context, spans = filled(kind, 10, 6, 8)
    before = kind.states(context)
    for name, method in kv.methods().items():
        if not method.needs <= kind.can:
            with pytest.raises(kv.OptionError, match=f"{name} cannot be done in {kind.name}'s cache"):
                context.erase_spans(spans[1], name)
    assert same(kind.states(context), before)
    assert context.erased == ()


def test_restoring_a_span_that_had_repaired_another_erased_since_recomputes(kind):
    context, (_, first, second, _) = filled(kind, 10, 6, 4, 20, repair=8)
    receipt = context.erase_spans(first)
    context.erase_spans(second)
    report = context.restore(receipt)
    assert not report.bit_exact
    # What stands behind the second one: it had been recomputed without the first.
    assert report.tokens_recomputed == 8 if Can.REPAIR in kind.can else report.exact
    assert context.erased == (second,)


def test_an_id_that_stood_in_for_erased_ones_goes_when_its_token_is_erased(kind):
    for later in kind.methods:
        context, spans = filled(kind, 10, 3, 4, 3, 9)
        context.erase_spans(spans[2])
        assert set(context.token_ids[13:17].tolist()) == {int(context._ids.view[12])}
        context.erase_spans(spans[1], later)
        assert len(context.token_ids) == context.backend.length
        context.erase_spans(spans[0], "kveraser")
        live = context._ids.view[17:].tolist()
        assert set(context.token_ids.tolist()) <= set(live)
        assert context.live_ids == live


def test_several_spans_go_in_one_call(kind):
    context, spans = filled(kind, 10, 6, 8, 5, 9)
    before = kind.states(context)
    receipt = context.erase_spans([spans[3], spans[1]])
    assert receipt.spans == (spans[1], spans[3])
    assert receipt.tokens_removed == 11
    assert context.restore(receipt).bit_exact
    assert same(kind.states(context), before)


def test_spans_that_meet_only_because_another_is_gone_are_erased_together(kind):
    context, spans = filled(kind, 10, 4, 4, 4, 9)
    context.erase_spans(spans[2], "delete-and-shift")
    receipt = context.erase_spans([spans[1], spans[3]], "full-recompute")
    assert receipt.spans == (spans[1], spans[3])
    assert context.exact


def test_repair_ends_bit_equal_to_full_recomputation_with_the_same_chunks(kind):
    repaired, spans = filled(kind, 10, 6, 40, 5, 30)
    exact, _ = filled(kind, 10, 6, 40, 5, 30)
    repaired.erase_spans(spans[1])
    repaired.erase_spans(spans[3], "kveraser")
    exact.erase_spans([spans[1], spans[3]], kv.FullRecompute(chunk=16))
    seen = []
    assert repaired.repair(chunk=16, progress=seen.append).finished
    assert [state.done for state in seen] == [16, 32, 48, 64, 70]
    assert same(kind.states(repaired), kind.states(exact))


def test_repair_goes_on_in_slices_while_the_context_is_used(kind):
    context, spans = filled(kind, 10, 6, 40)
    context.erase_spans(spans[1])
    assert not context.repair(chunk=8, max_chunks=2).finished
    answer = context.generate_ids([5, 6], max_new_tokens=3)
    context.append_ids([9, 9, 9])
    assert context.repair(chunk=8, max_chunks=2).done == 32
    assert context.repair(chunk=8).finished
    assert context.exact
    assert len(answer) <= 3
    assert kind.off(context) < kind.tolerance / 10


@pytest.mark.parametrize("chunk", [-3, -1, 0])
def test_a_chunk_without_tokens_is_refused_also_where_there_is_nothing_to_repair(kind, chunk):
    context, spans = filled(kind, 10, 6, 40)
    with pytest.raises(kv.OptionError, match=f"chunk={chunk} must be at least 1"):
        context.repair(chunk=chunk)
    context.erase_spans(spans[1])
    before = kind.states(context)
    assert not context.repair(chunk=8, max_chunks=2).finished
    with pytest.raises(kv.OptionError, match=f"chunk={chunk} must be at least 1"):
        context.repair(chunk=chunk)
    assert same(kind.states(context), before)
    assert context.repair(chunk=8, max_chunks=1).done == 24  # what was done stays


def test_an_interrupted_repair_loses_nothing(kind):
    context, spans = filled(kind, 10, 6, 40)
    context.erase_spans(spans[1])
    before = kind.states(context)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        context.repair(chunk=8, progress=stop)
    assert same(kind.states(context), before)
    assert context.repair(chunk=8, max_chunks=1).done == 16


def test_old_states_live_as_long_as_the_receipt(kind):
    context, spans = filled(kind, 10, 6, 40)
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


def test_an_erase_that_is_interrupted_leaves_ledger_and_cache_as_they_were(kind):
    context, spans = filled(kind, 10, 6, 40)
    before, ids = kind.states(context), context.token_ids

    for method in ("kveraser", "full-recompute", "local-suffix-repair"):
        with pytest.raises(KeyboardInterrupt), kind.failing(context, KeyboardInterrupt):
            context.erase_spans(spans[1], method)
        assert same(kind.states(context), before)
        assert torch.equal(context.token_ids, ids)
        assert context.erased == ()
        assert context.receipts == ()


@pytest.mark.parametrize("action", ["append", "generate", "logits", "advance"])
def test_running_ahead_that_is_interrupted_leaves_the_context_as_it_was(kind, action):
    context, _ = filled(kind, 10, 6)
    before = kind.states(context)
    calls = {
        "append": lambda: context.append_ids([5, 6, 7]),
        "generate": lambda: context.generate_ids([5, 6, 7], max_new_tokens=4, keep=True),
        "logits": lambda: context.logits_ids([5, 6, 7]),
        "advance": lambda: context.advance([5]),
    }
    with pytest.raises(KeyboardInterrupt), kind.failing(context, KeyboardInterrupt):
        calls[action]()
    assert same(kind.states(context), before)
    assert len(context) == 16


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("action", ["append", "generate", "advance"])
def test_an_interrupt_between_states_and_ledger_leaves_both_as_they_were(kind, action, registered, monkeypatch):
    context, _ = filled(kind, 10, 6)
    before, ids = kind.states(context), context.token_ids
    register = context._register

    def interrupted(new):
        if registered:
            register(new)
        raise KeyboardInterrupt

    monkeypatch.setattr(context, "_register", interrupted)
    calls = {
        "append": lambda: context.append_ids([5, 6, 7]),
        "generate": lambda: context.generate_ids([5, 6, 7], max_new_tokens=4, keep=True),
        "advance": lambda: context.advance([5]),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[action]()
    monkeypatch.undo()
    assert context.backend.length == len(context.token_ids) == len(context) == 16
    assert torch.equal(context.token_ids, ids)
    assert same(kind.states(context), before)
    context.append_ids([5])
    assert context.live_ids == [*ids.tolist(), 5]


def test_generating_without_new_text_runs_the_last_token_again(kind):
    context, _ = filled(kind, 12)
    shorter = kind.context()
    shorter.append_ids(context.live_ids[:-1])
    assert context.generate_ids(max_new_tokens=5) == shorter.generate_ids(context.live_ids[-1:], max_new_tokens=5)


def test_the_most_likely_token_is_generated_until_the_limit_or_an_end(kind):
    context, _ = filled(kind, 12)
    expected: list[int] = []
    while len(expected) < 5 and not (expected and context.backend.ends(expected[-1])):
        expected.append(int(context.logits_ids([7, *expected])[-1].argmax()))
    assert context.generate_ids([7], max_new_tokens=5) == expected


def test_tokens_one_by_one_give_the_logits_of_reading_them_at_once(kind):
    context, other = filled(kind, 12)[0], filled(kind, 12)[0]
    rows = [context.advance([token]) for token in (5, 6, 7)]
    assert torch.allclose(torch.stack(rows), other.logits_ids([5, 6, 7]), atol=1e-3)
    assert context.live_ids[-3:] == [5, 6, 7]
    assert kind.off(context) < kind.tolerance


def test_keeping_what_was_generated_equals_appending_it(kind):
    kept, _ = filled(kind, 12)
    answer = kept.generate_ids([5, 6], max_new_tokens=6, keep=True)
    assert kept.live_ids[-len(answer) - 2 :] == [5, 6, *answer]
    assert kept.backend.length == len(kept)
    assert kind.off(kept) < kind.tolerance / 10
    more = kept.generate_ids(max_new_tokens=3, keep=True)
    assert kept.live_ids[-len(more) :] == more
    assert kind.off(kept) < kind.tolerance / 10


def test_every_engine_replies_by_the_same_decoder(kind):
    context, _ = filled(kind, 12)
    before = kind.states(context)
    greedy = context.reply_ids([5, 6], max_new_tokens=6, min_new_tokens=6)
    assert len(greedy) == 6
    assert greedy == context.generate_ids([5, 6], max_new_tokens=6, min_new_tokens=6)
    seen = []
    assert context.reply_ids([5, 6], watch=lambda step: seen.append(step.token) or len(step.answer) == 2) == greedy[:2]
    assert seen == greedy[:2]

    drawn = [context.reply_ids([5, 6], Drawing(3.0, 0.95, seed), max_new_tokens=8) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])
    assert context.reply_ids([5, 6], Drawing(5.0, 1e-9, 3), max_new_tokens=6, min_new_tokens=6) == greedy
    with pytest.raises(kv.OptionError, match="top_p=0"):
        Drawing(top_p=0)
    with pytest.raises(kv.OptionError, match="max_new_tokens=0"):
        context.reply_ids([5, 6], max_new_tokens=0)
    assert same(kind.states(context), before)

    assert context.reply_ids([5, 6], max_new_tokens=6, min_new_tokens=6, keep=True) == greedy
    assert context.live_ids[-8:] == [5, 6, *greedy]
    assert kind.off(context) < kind.tolerance / 10


def test_a_reply_that_is_stopped_by_who_watches_it_leaves_the_context_as_it_was(kind):
    context, _ = filled(kind, 12)
    before = kind.states(context)

    def stop(step):
        if len(step.answer) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        context.reply_ids([5, 6], max_new_tokens=8, min_new_tokens=8, keep=True, watch=stop)
    assert same(kind.states(context), before)
    assert len(context) == 12


def test_an_emptied_context_needs_new_text(kind):
    context, spans = filled(kind, 12)
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


@pytest.mark.parametrize(
    ("ids", "word"),
    [([1.5], r"float32 such as \[1.5\]"), (torch.tensor([2.0]), r"\[2.0\]"), ([True], "bool"), (None, "got None"), (["a"], "got .'a'."),
     ([[1, 2], [3]], r"\[3\]")],
)  # fmt: skip
def test_ids_that_are_no_integers_are_refused_and_nothing_changes(kind, ids, word):
    context, _ = filled(kind, 12)
    before = kind.states(context)
    for call in (
        context.append_ids,
        context.logits_ids,
        context.advance,
        lambda ids: context.generate_ids(ids, max_new_tokens=2, keep=True),
    ):
        with pytest.raises(kv.OptionError, match=word):
            call(ids)
    assert same(kind.states(context), before)
    assert len(context) == 12


@pytest.mark.parametrize(("ids", "word"), [([], "no tokens"), ([5, 500], "500"), ([-1], "-1")])
def test_ids_that_the_model_does_not_have_are_refused(kind, ids, word):
    context, _ = filled(kind, 12)
    with pytest.raises(kv.ContextError, match=word):
        context.append_ids(ids)
    assert len(context) == 12


def test_a_receipt_of_another_context_is_refused(kind):
    context, spans = filled(kind, 12, 5, 9)
    other, _ = filled(kind, 12, 5, 9)
    receipt = context.erase_spans(spans[1])
    with pytest.raises(kv.RestoreError, match="another context"):
        other.restore(receipt)


def test_no_erase_leaves_the_context_alone(kind):
    context, spans = filled(kind, 12, 5, 9)
    before = kind.states(context)
    receipt = context.erase_spans(spans[1], "no-erase")
    assert not receipt.exact
    assert context.erased == ()
    assert same(kind.states(context), before)
    with pytest.raises(kv.RestoreError, match="nothing to purge"):
        context.purge(receipt)
    assert context.restore(receipt).bit_exact


def test_receipts_and_erased_spans_can_be_read_while_another_thread_erases(kind):
    context, spans = filled(kind, 10, 6, 8, 5, 9)
    context.erase_spans(spans[1])
    known = next(iter(context._records.values()))
    more = iter([spans[3]])

    def meanwhile():  # what a worker does while a reader is in the middle
        for span in more:
            context.erase_spans(span)

    known.undo = meanwhile
    assert [receipt.span for receipt in context.receipts] == [spans[1]]
    assert context.erased == (spans[1], spans[3])
    assert [receipt.span for receipt in context.receipts] == [spans[1], spans[3]]


def test_a_reader_in_another_thread_never_sees_a_context_half_changed(kind):
    context, _ = filled(kind, 60)
    problems, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            try:
                erased = context.erased
                assert erased == tuple(sorted(set(erased)))
                live = context.live_spans
                assert not any(a.overlaps(b) for a, b in itertools.combinations(live, 2))
                assert len({receipt.id for receipt in context.receipts}) <= 3
            except Exception as error:
                problems.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(15):
            receipts = [context.erase_spans(kv.Span(at, at + 4), "delete-and-shift") for at in (40, 10, 25)]
            for receipt in receipts:
                context.restore(receipt)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert problems == []
