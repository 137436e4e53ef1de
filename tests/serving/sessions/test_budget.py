"""Everything that a session keeps counts in the cache budget: also what undoes its erases, and the copy of a repair."""

from __future__ import annotations

import pytest

import kveraser as kv
from kveraser.errors import JobCancelledError
from kveraser.serving.contexts.held import context_bytes
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.worker import Job

PART = "the color of the car is blue, the color of the door is blue, it is fast. "


def session(service, parts):
    sessions = Sessions(service.store, service.limits)
    name = sessions.create("me").id
    return sessions, name, [sessions.append_text("me", name, f"{number}: {PART}") for number in range(parts)]


def test_what_undoes_erases_counts_and_the_oldest_goes_first(make_service):
    service = make_service(cache_budget=200_000)
    sessions, name, spans = session(service, 12)
    before = sessions.get("me", name).context.text
    erased, kept = [], []
    for span in spans[:-1]:
        erased.append(sessions.erase("me", name, Selection(spans=(span,)), "kveraser:repair=0").id)
        assert service.store.bytes <= 200_000
        held = sessions.get("me", name)
        kept.append(list(held.receipts))
        assert held.bytes == context_bytes(held.context) + sum(r.undo.nbytes for r in held.receipts.values())
    assert kept[-1] == erased[-len(kept[-1]) :]  # the newest ones
    assert 0 < len(kept[-1]) < len(erased)
    reports = [sessions.restore("me", name, each) for each in reversed(erased)]
    assert reports[0].bit_exact
    assert reports[0].tokens_recomputed == 0
    assert reports[-1].tokens_recomputed > 0  # by recomputing, and it says so
    assert sessions.get("me", name).context.text == before


def test_the_copy_of_a_repair_that_was_cancelled_counts_until_the_session_is_exact(make_service):
    service = make_service()
    sessions, name, spans = session(service, 12)
    sessions.erase("me", name, Selection(spans=(spans[0],)), "kveraser")
    held = sessions.get("me", name)
    undo = sum(receipt.undo.nbytes for receipt in held.receipts.values())
    gone = Job(lambda job: None, 60)
    gone.cancel()
    with pytest.raises(JobCancelledError):
        sessions.repair("me", name, gone, chunk=64)
    assert held.bytes == 2 * context_bytes(held.context) + undo
    sessions.repair("me", name, Job(lambda job: None, 60), chunk=64)
    assert held.exact
    assert service.store.bytes == context_bytes(held.context)


def test_a_repair_that_does_not_fit_beside_the_session_is_refused(make_service):
    service = make_service(cache_budget=200_000)
    sessions, name, spans = session(service, 12)
    sessions.erase("me", name, Selection(spans=(spans[0],)), "kveraser")
    with pytest.raises(kv.ContextError, match="2 times"):
        sessions.repair("me", name, Job(lambda job: None, 60))
    assert service.store.bytes <= 200_000


def test_a_restore_for_which_there_is_no_room_is_refused_and_the_session_can_still_be_changed(make_service):
    service = make_service(cache_budget=200_000)
    sessions, name, spans = session(service, 5)
    gone = sessions.erase("me", name, Selection(spans=tuple(spans[:4])), "delete-and-shift").id
    while True:
        try:
            spans.append(sessions.append_text("me", name, PART))
        except kv.ContextError:
            break
    before = sessions.get("me", name).context.text
    with pytest.raises(kv.ContextError, match="budget"):
        sessions.restore("me", name, gone)
    assert sessions.get("me", name).context.text == before
    assert service.store.bytes <= 200_000
    for span in spans[5:10]:
        sessions.erase("me", name, Selection(spans=(span,)), "delete-and-shift")
    sessions.restore("me", name, gone)
    assert sessions.get("me", name).context.text.startswith(f"0: {PART}")
    assert service.store.bytes <= 200_000


@pytest.mark.parametrize("method", ["kveraser", "full-recompute"])
def test_what_was_steered_or_recomputed_can_be_restored_where_it_is_while_the_budget_is_full(make_service, method):
    service = make_service(cache_budget=200_000)
    sessions, name, spans = session(service, 12)
    before = sessions.get("me", name).context.text
    erased = sessions.erase("me", name, Selection(spans=(spans[3],)), method).id
    assert sessions.restore("me", name, erased).exact
    assert sessions.get("me", name).context.text == before


def test_a_session_that_is_larger_than_the_budget_can_be_made_smaller(make_service, tmp_path):
    service = make_service(cache_budget=400_000, state_dir=tmp_path)
    _, name, spans = session(service, 12)
    service.close()
    service = make_service(cache_budget=100_000, state_dir=tmp_path)
    sessions = Sessions(service.store, service.limits)
    with pytest.raises(kv.ContextError, match="budget"):
        sessions.append_text("me", name, PART)
    for span in spans[:10]:
        sessions.erase("me", name, Selection(spans=(span,)), "full-recompute", purge=True)
    sessions.append_text("me", name, PART)
    assert service.store.bytes <= 100_000
