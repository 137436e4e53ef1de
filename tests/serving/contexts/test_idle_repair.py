"""What was steered under `auto` is exact after a while without requests."""

from __future__ import annotations

import pytest
from serving_helpers import TALK, ask, fresh, newest_context, settle, with_placeholder, without

import kveraser as kv
from conftest import random_eraser, text_model


def test_auto_steers_at_once_and_the_next_turn_is_exact(make_service):
    service = make_service()
    ask(service, TALK)
    first = ask(service, without(TALK, 2), "auto")
    assert (first.reuse.method, first.reuse.exact) == ("kveraser", False)
    settle(service)
    later = [*without(TALK, 2), ("assistant", "blue"), ("user", "and the door?")]
    second = ask(service, later, "auto")
    assert (second.reuse.method, second.reuse.exact) == ("prefix", True)
    assert second.text == fresh(make_service, later).text


def test_a_placeholder_is_steered_over_and_rebuilt_exactly_when_idle(make_service):
    service = make_service()
    ask(service, TALK)
    cleared = with_placeholder(TALK, 2)
    first = ask(service, cleared, "auto")
    assert (first.reuse.method, first.reuse.exact) == ("kveraser", False)
    assert first.reuse.tokens_reused > first.prompt_tokens - 25
    settle(service)
    held = newest_context(service)
    assert held.exact
    later = [*cleared, ("assistant", "blue"), ("user", "and the door?")]
    second = ask(service, later, "auto")
    assert (second.reuse.method, second.reuse.exact) == ("prefix", True)
    assert second.text == fresh(make_service, later).text


def test_a_repair_that_fails_leaves_the_conversation_approximate_and_the_server_alive(make_service, monkeypatch):
    service = make_service()
    ask(service, TALK)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kv.ErasableContext, "repair", fail)
    ask(service, without(TALK, 2), "auto")
    settle(service)
    assert not ask(service, without(TALK, 2), "auto").reuse.exact


def test_what_an_edit_left_does_not_count_for_the_next_one_once_it_is_repaired(make_service):
    def residuals(*talks):
        """Of one conversation that is edited again and again, and repaired after each edit."""
        service = make_service(eraser=random_eraser(text_model(), repair=16))
        for talk in talks:
            yield ask(service, talk, "auto").reuse.residual
            settle(service)

    once, twice = without(TALK, 2), without(TALK, 1, 2)
    _, first, second = residuals(TALK, once, twice)
    _, alone = residuals(once, twice)
    assert second == pytest.approx(alone)
    assert second < first
