"""Replacing in a live context, over every kind: the new text is there as if it had always been, and everything can be undone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from conftest import same, tiny, token_ids
from kinds import EVERY_KIND
from kveraser.cache import Can
from kveraser.readers import calibrate, remember

pytestmark = pytest.mark.parametrize("kind", EVERY_KIND)
BEFORE, OLD, BEHIND = (
    "the code of the door is ",
    "1234, and ",
    "the color of the car is blue. the car is fast. it is blue.",
)


def said(kind):
    context = kind.text_context()
    context.append(BEFORE)
    return context, context.append(OLD), context.append(BEHIND)


@pytest.mark.parametrize("new", ["99, ", "9876, but ", "one that nobody knows any more, and "])
@pytest.mark.parametrize("method", ["kveraser", "full-recompute", "delete-and-shift"])
def test_the_new_text_stands_where_the_old_one_stood_and_can_be_located_replaced_and_erased(kind, method, new):
    context, old, behind = said(kind)
    before = kind.states(context)
    receipt = context.replace(OLD, new, method)
    assert context.text == BEFORE + new + BEHIND
    assert context.text_of(receipt.replacement) == new
    assert context.locate(new) == receipt.replacement
    assert context.text_of(old) == OLD
    assert [span for span, live in context.runs if live] == list(context.live_spans)
    assert "".join(context.text_of(span) for span, _ in context.runs) == BEFORE + new + OLD + BEHIND
    assert len(context.token_ids) == context.backend.length
    again = context.replace(receipt.replacement, "no secret, and ", method)
    assert context.text == BEFORE + "no secret, and " + BEHIND
    gone = context.erase([again.replacement, behind], method)
    assert context.text == BEFORE
    with pytest.raises(kv.RestoreError, match="restore that one first"):
        context.restore(again)
    with pytest.raises(kv.SpanError, match=r"what replaced it is \["):
        context.erase(old)
    for undone in (gone, again, receipt):
        context.restore(undone)
    assert same(kind.states(context), before)
    assert context.text == BEFORE + OLD + BEHIND
    assert context.ids_of(receipt.replacement) == []
    assert not context.receipts
    assert gone.span == kv.Span(behind.start, again.replacement.end)


@pytest.mark.parametrize("method", ["kveraser", "delete-and-shift"])
@pytest.mark.parametrize("count", [2, 6, 9])
def test_repair_ends_bit_equal_to_recomputing_the_replaced_text(kind, method, count):
    ids, new = token_ids(80)[0], token_ids(count, seed=5)[0]
    context, other = kind.context(repair=4), kind.context()
    for each in (context, other):
        each.append_ids(ids)
    context.replace_spans(kv.Span(30, 36), new, method)
    other.replace_spans(kv.Span(30, 36), new, "full-recompute")
    context.repair()
    assert context.exact
    assert context.live_ids == other.live_ids == [*ids[:30].tolist(), *new.tolist(), *ids[36:].tolist()]
    assert same(kind.states(context), kind.states(other))


def test_what_is_saved_says_the_new_text_and_can_still_be_restored_and_replaced(kind, tmp_path):
    context, old, _ = said(kind)
    receipt = context.replace(old, "99, ")
    context.save(tmp_path / "session")
    loaded = kind.load(tmp_path / "session", context)
    assert loaded.text == context.text
    assert loaded.token_ids.tolist() == context.token_ids.tolist()
    assert loaded.receipts[0].replacement == receipt.replacement
    more = loaded.replace(receipt.replacement, "7, ")
    assert "7, " in loaded.text
    loaded.restore(more)
    loaded.restore(loaded.receipts[0])
    assert loaded.text == BEFORE + OLD + BEHIND


def test_a_purged_replacement_leaves_the_new_text_and_nothing_of_the_old_one(kind):
    context, old, _ = said(kind)
    receipt = context.replace(old, "99, ")
    context.purge(receipt)
    assert context.exact
    assert context.ids_of(old) == []
    assert context.text == BEFORE + "99, " + BEHIND
    gone = context.erase(receipt.replacement)
    context.purge(gone)
    assert context.ids_of(receipt.replacement) == []
    assert context.text == BEFORE + BEHIND


def test_a_message_is_replaced_again_and_again_by_its_id(kind):
    context = kind.text_context()
    context.append_message("user", "what is the code of the door?", id="q")
    context.append_message("user", "the code is 1234.", id="a")
    context.append_message("user", "the car is blue.")
    first = context.replace("a", "the code is 5.")
    context.replace("a", "the code is the color of the car.")
    part = context.replace("color of", "name of")  # a part of what stands there
    assert "the code is the name of the car." in context.text
    context.restore(part)
    context.erase("a")
    assert "code is" not in context.text
    assert first.tokens_removed


def test_of_a_message_whose_replacement_was_erased_there_is_nothing_left_to_erase_or_replace(kind):
    context = kind.text_context()
    context.append_message("user", "what is the code of the door?", id="q")
    context.append_message("user", "the code is 1234.", id="a")
    context.append_message("user", "the car is blue.")
    context.replace("a", "the code is 5.")
    context.replace("a", "the code is 67.")
    gone = context.erase("a")
    before, live = kind.states(context), context.live_ids
    for call in (
        lambda: context.erase("a"),
        lambda: context.replace("a", "the code is 8."),
        lambda: context.readers("a"),
    ):
        with pytest.raises(kv.SpanError, match="nothing is left of 'a': what had replaced it is erased"):
            call()
    assert same(kind.states(context), before)
    assert context.live_ids == live
    context.restore(gone)
    assert "the code is 67." in context.text
    context.erase("a")
    assert context.live_ids == live


def test_equal_text_changes_nothing_and_an_empty_one_erases(kind):
    context, old, _ = said(kind)
    before = kind.states(context)
    receipt = context.replace(old, OLD)
    assert receipt.replacement == old
    assert same(kind.states(context), before)
    context.restore(receipt)
    assert same(kind.states(context), before)
    assert context.replace(old, "").replacement is None
    assert context.text == BEFORE + BEHIND


def test_the_end_of_a_context_is_replaced_exactly_by_every_method(kind):
    context, old, behind = said(kind)
    fresh = kind.text_context()
    fresh.append_ids([*context.live_ids[: behind.start], *context.encode("it is fast.")])
    receipt = context.replace(behind, "it is fast.")
    assert receipt.exact
    assert kind.off(context) < kind.tolerance
    context.erase(old)
    context.replace(receipt.replacement, "it is slow.", "full-recompute")  # which mends what the erase left
    assert context.exact
    assert context.text == BEFORE + "it is slow."


def test_a_replacement_that_is_interrupted_leaves_everything_as_it_was(kind):
    context, old, _ = said(kind)
    before, length = kind.states(context), len(context)
    for new in ("9, ", "a longer text than it was, and "):
        with kind.failing(context, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            context.replace(old, new)
        assert same(kind.states(context), before)
        assert (len(context), context.text, context.receipts) == (length, BEFORE + OLD + BEHIND, ())
    with pytest.raises(kv.ContextError, match="vocabulary"):
        context.replace(old, [10**6])
    with pytest.raises(kv.SpanError, match="not in the context"):
        context.replace("nothing of the kind", "x")


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    remember(tiny(), calibrate(tiny(), token_ids(500, seed=8)[0]))


SPANS = [kv.Span(40, 48), kv.Span(10, 14), kv.Span(70, 76), kv.Span(20, 26)]


@pytest.mark.long
@given(
    st.permutations(range(4)),
    st.permutations(SPANS),
    st.lists(st.integers(0, 8), min_size=4, max_size=4),
    st.booleans(),
)
@settings(max_examples=5)
def test_restoring_erases_and_replacements_in_any_order_ends_where_it_began(kind, order, spans, counts, neutral):
    ids = token_ids(110)[0]
    context = kind.context(window=(2, 8))
    context.append_ids(ids)
    start = kind.states(context)
    receipts = []
    for span, count in zip(spans, counts, strict=True):
        new = token_ids(min(count, len(span)), seed=count)[0]
        receipts.append(context.replace_spans(span, new, kind.steering(6, neutral=neutral)))
    wanted = ids.tolist()
    for span, count in sorted(zip(spans, counts, strict=True), reverse=True):
        wanted[span.slice] = token_ids(min(count, len(span)), seed=count)[0].tolist()
    assert context.live_ids == wanted
    reports = [context.restore(receipts[index]) for index in order]
    if Can.REPAIR in kind.can or all(report.bit_exact for report in reports):
        assert same(kind.states(context), start)
    assert context.exact
    assert context.live_ids == ids.tolist()
    assert kind.off(context) < kind.tolerance
