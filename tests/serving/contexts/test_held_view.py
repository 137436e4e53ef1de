"""The view of a conversation is right after every change, and is made once per change."""

from __future__ import annotations

import numpy as np
import pytest
from serving_helpers import TALK, ask, chat_ids, newest_context, settle, with_placeholder, without

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.view import View
from kveraser.spans import Span


@pytest.fixture
def views(monkeypatch):
    """Counts the views that are made."""
    made, original = [], View.of
    monkeypatch.setattr(View, "of", lambda *args: made.append(args) or original(*args))
    return made


@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_request_makes_the_view_of_what_has_changed_only_however_many_conversations_there_are(
    make_service, views, others
):
    service = make_service()
    for number in range(others):
        ask(service, [("user", f"{number} the code")])
    ask(service, TALK)
    views.clear()
    ask(service, TALK)  # the view of the one that the last request had changed
    assert len(views) == 1
    views.clear()
    ask(service, without(TALK, 2), "kveraser")
    assert len(views) == 1
    views.clear()
    ask(service, without(TALK, 2), "exact")
    assert len(views) == 1
    views.clear()
    ask(service, [("user", "something new")])
    assert len(views) == 1


def test_nothing_of_a_view_can_be_changed():
    context = kv.ErasableContext(text_model(), make_tokenizer())
    context.append("the code is 1234")
    view = View.of(context)
    with pytest.raises(ValueError, match="read-only"):
        view.ids[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        view.where[0] = 5


def test_after_every_kind_of_change_the_view_is_that_of_the_context_as_it_is():
    context = kv.ErasableContext(text_model(), make_tokenizer(), random_eraser(text_model()))
    held = HeldContext("a", "", False, context)

    def check():
        fresh = View.of(held.context)
        assert np.array_equal(held.view.ids, fresh.ids)
        assert np.array_equal(held.view.where, fresh.where)
        assert held.view is held.view

    check()
    first = context.append("the code is 1234, ")
    check()
    context.append("the car is blue")
    check()
    receipt = context.erase(first)
    check()
    assert held.exact_until == 0
    context.restore(receipt)
    check()
    receipt = context.replace(first, [7, 8])
    check()
    assert held.view.ids[:2].tolist() == [7, 8]
    assert held.view.ledger_spans(0, 3) == [receipt.replacement, Span(first.end, first.end + 1)]
    context.restore(receipt)
    check()
    context.erase(Span(first.start + 1, first.end))
    check()
    context.repair()
    check()
    held.context = context.prefix(1, take=True)
    check()
    held.context.advance([5])
    check()


def test_the_view_after_an_exact_rebuild_is_what_the_client_sent(make_service):
    service = make_service()
    cleared = with_placeholder(TALK, 2)
    ask(service, TALK)
    ask(service, cleared, "auto")
    settle(service)
    held = newest_context(service)
    assert tuple(held.view.ids[: len(chat_ids(cleared))].tolist()) == chat_ids(cleared)
    assert held.exact
