"""Cached conversations within the memory budget, on disk, and after a restart."""

from __future__ import annotations

import pytest
from serving_helpers import TALK, ask, with_placeholder

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.serving.contexts import held, store
from kveraser.serving.service import Service, ServiceOptions
from kveraser.serving.sessions.sessions import Sessions


def test_memory_stays_within_the_budget_and_spilled_conversations_come_back(make_service):
    service = make_service(cache_budget=200_000)
    talks = [[("user", f"{number} {TALK[4][1]}")] for number in range(12)]
    for talk in talks:
        ask(service, talk)
        assert service.store.bytes <= 200_000
    assert service.store.count[1] > 0
    for talk in talks:
        reply = ask(service, talk)
        assert reply.reuse.tokens_reused == reply.prompt_tokens - 1
        assert service.store.bytes <= 200_000
    too_long = [("user", TALK[4][1] * 30)]
    with pytest.raises(kv.ContextError, match="cache budget"):
        ask(service, too_long)


@pytest.mark.parametrize("extra", [0, 1 << 24])
def test_making_room_measures_each_context_once_however_many_it_lets_go_of(make_service, monkeypatch, extra):
    service = make_service()
    for number in range(6):
        ask(service, [("user", f"{number} {TALK[4][1]}")])
    measured = []

    def make_room(job):
        monkeypatch.setattr(held, "context_bytes", lambda context: measured.append(context) or 1000)
        service.store.make_room(extra)
        monkeypatch.undo()

    service.submit(make_room).future.result(5)
    assert service.store.count == ((0, 6) if extra else (6, 0))
    assert len(measured) == 6


def test_of_empty_sessions_only_so_many_stay_in_memory_and_the_others_come_back_from_disk(make_service, monkeypatch):
    monkeypatch.setattr(store, "MOST_HELD", 3)
    service = make_service()
    sessions = Sessions(service.store, service.limits)
    names = [sessions.create("me").id for _ in range(5)]
    assert service.store.count == (3, 2)
    assert sessions.names("me") == sorted(names)
    assert [sessions.get("me", name).id for name in names] == names


def test_conversations_survive_a_restart_also_steered_ones(make_service, tmp_path):
    service = make_service(state_dir=tmp_path / "s")
    ask(service, TALK)
    before = ask(service, with_placeholder(TALK, 2), "kveraser")
    with pytest.raises(kv.SessionFileError, match="in use"):
        Service(text_model(), make_tokenizer(), None, ServiceOptions(state_dir=tmp_path / "s"))
    service.close()
    service = make_service(state_dir=tmp_path / "s")
    after = ask(service, with_placeholder(TALK, 2), "kveraser")
    assert (after.reuse.method, after.reuse.exact, after.text) == ("prefix", False, before.text)
    assert after.reuse.tokens_reused == after.prompt_tokens - 1


def test_a_damaged_conversation_on_disk_is_dropped_and_read_again(make_service, tmp_path):
    service = make_service(state_dir=tmp_path / "s")
    text = ask(service, TALK).text
    service.close()
    for file in (tmp_path / "s" / "contexts").glob("*/session.kveraser"):
        file.write_bytes(file.read_bytes()[:-4])
    service = make_service(state_dir=tmp_path / "s")
    reply = ask(service, TALK)
    assert (reply.reuse.method, reply.text) == ("prefill", text)


def test_a_full_disk_costs_a_cached_conversation_and_nothing_else(make_service, monkeypatch):
    service = make_service(cache_budget=200_000)
    ask(service, [("user", TALK[4][1])])

    def full(*_):
        raise OSError(28, "No space left on device")

    import kveraser.files

    monkeypatch.setattr(kveraser.files.os, "fsync", full)
    for number in range(4):
        ask(service, [("user", f"{number} {TALK[4][1]}")])
    assert service.store.bytes <= 200_000
    assert service.store.count[1] == 0


def test_a_disk_on_which_nothing_can_be_removed_costs_no_request_its_answer(make_service, monkeypatch, tmp_path):
    service = make_service(cache_budget=200_000, state_dir=tmp_path)
    talks = [[("user", f"{number} {TALK[4][1]}")] for number in range(24)]
    expected = [ask(make_service(), talk).text for talk in talks[:3]]

    def full(*_):
        raise OSError(28, "No space left on device")

    import kveraser.serving.contexts.state_dir as state_dir

    for talk in talks[:12]:
        ask(service, talk)
    monkeypatch.setattr(state_dir.os, "replace", full)
    for talk in talks:  # some are read from disk, some are too many for it
        ask(service, talk)
        assert service.store.bytes <= 200_000
    monkeypatch.undo()
    assert [ask(service, talk).text for talk in talks[:3]] == expected
    service.close()
    again = make_service(cache_budget=200_000, state_dir=tmp_path)
    assert [ask(again, talk).text for talk in talks[:3]] == expected


def test_a_session_that_cannot_be_removed_is_still_there_and_its_owner_hears_of_it(make_service, monkeypatch, tmp_path):
    service = make_service(state_dir=tmp_path)
    sessions = Sessions(service.store, service.limits)
    name = sessions.create("me").id
    import kveraser.serving.contexts.state_dir as state_dir

    monkeypatch.setattr(state_dir.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(OSError, match="Read-only"):
        sessions.delete("me", name)
    monkeypatch.undo()
    assert sessions.names("me") == [name]
    sessions.delete("me", name)
    assert sessions.names("me") == []
