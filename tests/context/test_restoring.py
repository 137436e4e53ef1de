"""Restoring edits in any order: nothing that was erased later comes back, and in the end every bit is what it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import relative, same, tiny, token_ids
from kinds import EVERY_KIND
from kveraser.cache import Can
from kveraser.readers import calibrate, remember

pytestmark = pytest.mark.parametrize("kind", EVERY_KIND)


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    remember(tiny(), calibrate(tiny(), token_ids(500, seed=8)[0]))


def erased_context(kind, ids, spans, method):
    context = kind.context(window=(2, 8))
    context.append_ids(ids[0])
    start = kind.states(context)
    return context, start, [context.erase_spans(span, method) for span in spans]


SPANS = [kv.Span(40, 48), kv.Span(10, 14), kv.Span(70, 76), kv.Span(20, 26)]
LENGTH = 110


@pytest.mark.long
@given(st.permutations(range(4)), st.permutations(SPANS), st.sampled_from([0, 6, 20]), st.booleans())
def test_restoring_all_edits_in_any_order_ends_where_it_began(kind, order, spans, repair, neutral):
    """Bit for bit, where the backend can recompute the very tokens that must not come back yet."""
    method = kind.steering(repair, neutral=neutral)
    context, start, receipts = erased_context(kind, token_ids(LENGTH), spans, method)
    reports = [context.restore(receipts[index]) for index in order]
    if Can.REPAIR in kind.can or all(report.bit_exact for report in reports):
        assert same(kind.states(context), start)
    assert context.exact
    assert context.live_ids == token_ids(LENGTH)[0].tolist()
    assert kind.off(context) < kind.tolerance


@pytest.mark.long
@given(st.permutations(SPANS), st.integers(0, 2), st.sampled_from([6, 20]))
def test_restoring_an_older_edit_brings_back_nothing_of_what_a_later_one_erased(kind, spans, which, repair):
    """Contexts that differ in the span erased last alone are the same wherever a restore or a repair has written."""
    ids = token_ids(LENGTH)
    other = ids.clone()
    other[0, spans[-1].slice] = token_ids(len(spans[-1]), seed=7)[0]
    method = kind.steering(repair, neutral=True)
    found, written = [], []
    for these in (ids, other):
        context, _, receipts = erased_context(kind, these, spans, method)
        before = kind.by_slot(context, LENGTH)
        report = context.restore(receipts[which])
        found.append(context)
        if report.exact and not report.bit_exact:  # everything that had read it was recomputed
            written.append(None)
            continue
        now = kind.by_slot(context, LENGTH)
        written.append({slot for slot in range(LENGTH) if not same(before[slot], now[slot])})
    if None in written:
        assert written == [None, None]
        assert found[0].live_ids == found[1].live_ids
        assert same(kind.states(found[0]), kind.states(found[1]))
        return
    slots = (written[0] | written[1]) - {s for span in spans for s in span if span != spans[which]}
    assert set(spans[which]) <= written[0]
    clean = [slot for slot in sorted(slots) if slot < spans[-1].start]
    recomputed = [slot for slot in sorted(slots) if slot >= spans[-1].end]
    for part in (clean, recomputed):
        if part and max(part) < _first_unrepaired(receipts, spans[-1]):
            assert relative(*(kind.of_slots(context, part) for context in found)) < 1e-5


def _first_unrepaired(receipts, last):
    """The first slot behind the span erased last that its own edit did not recompute: it still holds what it had read."""
    repaired = {slot for run in receipts[-1].recomputed for slot in run}
    behind = [slot for slot in range(last.end, LENGTH) if slot not in repaired]
    return behind[0] if behind and behind[0] > last.start else LENGTH


def test_an_edit_that_erased_nothing_is_undone_under_a_later_one(kind):
    context, start, receipts = erased_context(kind, token_ids(LENGTH), SPANS[:1], "no-erase")
    later = context.erase_spans(SPANS[1], kind.steering(6))
    assert context.restore(receipts[0]).bit_exact
    assert context.restore(later).bit_exact
    assert same(kind.states(context), start)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_restore_that_fails_while_it_recomputes_changes_nothing(kind, error):
    context, _, receipts = erased_context(kind, token_ids(LENGTH), SPANS, kind.steering(6, neutral=True))
    before, live, erased = kind.states(context), context.live_ids, context.erased
    with pytest.raises(error), kind.failing(context, error):
        context.restore(receipts[0])
    assert same(kind.states(context), before)
    assert (context.live_ids, context.erased) == (live, erased)
    assert context.restore(receipts[0]).tokens_recomputed


@pytest.mark.parametrize("later", [None, "in place", "moved", "appended"])
def test_a_receipt_keeps_no_state_of_what_is_back_in_the_context(kind, later):
    """However it is undone: what is purged afterwards is not in it either."""
    context, _, (receipt,) = erased_context(kind, token_ids(LENGTH), SPANS[:1], kind.steering(6))
    if later == "appended":
        context.append_ids([5, 6])
    elif later is not None:
        context.erase_spans(SPANS[1], kind.steering(6) if later == "in place" else "delete-and-shift")
    assert receipt.undo.nbytes
    context.restore(receipt)
    assert receipt.undo.cleared
    assert receipt.undo.nbytes == 0


def test_what_is_recomputed_under_a_later_edit_ends_the_same_in_several_passes(kind, monkeypatch):
    found = []
    for chunk in (None, 8):
        context, _, receipts = erased_context(kind, token_ids(LENGTH), SPANS[:2], kind.steering(20, neutral=True))
        if chunk:
            monkeypatch.setattr(type(context.backend), "chunk", chunk)
        report = context.restore(receipts[0])
        assert not report.bit_exact
        found.append((report.tokens_recomputed, kind.states(context)))
    assert found[0][0] == found[1][0] > 8
    assert relative(found[0][1], found[1][1]) < kind.tolerance
