"""The server is killed at every step it takes on the disk: nothing acknowledged is lost, nothing that was purged can be read."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from conftest import make_tokenizer, random_eraser, text_model
from files_helpers import counted, killing_disk, readable_bytes
from kveraser.errors import SessionNotFoundError
from kveraser.serving.contexts.cards import CARD, card_of, read_card
from kveraser.serving.contexts.limits import Limits
from kveraser.serving.contexts.store import ContextStore
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions

SECRET = "xylophone quartz"
BUDGET = 1 << 24


@cache
def parts():
    model, tokenizer = text_model(), make_tokenizer()
    return model, tokenizer, random_eraser(model), Limits.of(model, tokenizer, BUDGET)


class Server:
    """What a server has of a state folder, without a thread."""

    def __init__(self, folder):
        model, tokenizer, eraser, limits = parts()
        self.store = ContextStore(model, tokenizer, eraser, budget=BUDGET, folder=folder)
        self.sessions = Sessions(self.store, limits)

    def die(self):
        """Let go of what the system lets go of when a process ends."""
        if hasattr(self, "store"):
            self.store._disk._lock.release()

    def state(self, name):
        context = self.sessions.get("me", name).context
        return context.text, context.erased, [receipt.id for receipt in context.receipts]


@pytest.fixture
def killer(tmp_path, monkeypatch):
    with killing_disk(tmp_path / "kept", monkeypatch) as found:
        yield found


def append(sessions, name):
    sessions.append_message("me", name, "tool", "the door is fast", "call-3")


def erase(sessions, name):
    sessions.erase("me", name, Selection(message="secret"), "kveraser")


def restore(sessions, name):
    sessions.restore("me", name, sessions.get("me", name).context.receipts[0].id)


def purge_later(sessions, name):
    sessions.purge("me", name, sessions.get("me", name).context.receipts[0].id)


def erase_and_purge(sessions, name):
    sessions.erase("me", name, Selection(message="secret"), "kveraser", purge=True)


def stop(sessions, name):
    sessions.store.close()


VERBS = [(append, False), (erase, False), (restore, True), (purge_later, True), (erase_and_purge, False), (stop, False)]


@pytest.mark.parametrize(("verb", "erased"), VERBS, ids=[verb.__name__ for verb, _ in VERBS])
def test_a_change_that_is_killed_at_any_step_is_made_or_not_and_can_be_made_then(killer, tmp_path, verb, erased):
    for step in counted():
        folder, killer.kept = tmp_path / f"s{step}", tmp_path / f"kept{step}"
        killer.kept.mkdir()
        server = Server(folder)
        conversation = server.store.new("me", is_session=False)
        conversation.context.append("the car is blue")
        name = server.sessions.create("me").id
        server.sessions.append_message("me", name, "user", "the car is blue", None)
        server.sessions.append_message("me", name, "tool", SECRET, "secret")
        if erased:
            erase(server.sessions, name)
        before, done = server.state(name), False
        with killer.until(step):
            verb(server.sessions, name)
            done = True
        server.die()
        server = Server(folder)
        now = server.state(name)
        if verb is stop:
            assert now == before
        elif done:
            assert now != before
        elif now == before:
            verb(server.sessions, name)
            assert server.state(name) != before
        if verb in (purge_later, erase_and_purge):
            assert SECRET.encode() not in readable_bytes(killer.versions())
            assert SECRET not in str(server.state(name))
        append(server.sessions, name) if verb is not append else None
        server.die()
        if done:
            break
    assert step > 4


def test_a_session_that_is_being_made_or_deleted_is_there_or_not_whatever_step_is_the_last(killer, tmp_path):
    """Also: nothing of a deleted one can be read, whatever step was the last, once the server was started again."""
    for step in counted():
        folder, killer.kept = tmp_path / f"s{step}", tmp_path / f"kept{step}"
        killer.kept.mkdir()
        server = Server(folder)
        acknowledged, name, done = 0, "", False
        with killer.until(step):
            name = server.sessions.create("me").id
            acknowledged = 1
            server.sessions.append_text("me", name, SECRET)
            acknowledged = 2
            server.sessions.delete("me", name)
            done = True
        server.die()
        server = Server(folder)
        there = server.sessions.names("me")
        assert there == [name] or acknowledged == 0 or (acknowledged == 2 and there == [])
        assert not (done and there)
        for name in there:
            assert server.state(name)[0] == SECRET or acknowledged < 2
            server.sessions.delete("me", name)
        assert list((folder / "contexts").iterdir()) == []
        assert SECRET.encode() not in readable_bytes(killer.versions())
        server.die()
        if done:
            break
    assert step > 15


def test_a_server_that_is_killed_while_it_starts_starts_again(killer, tmp_path):
    for step in counted():
        folder = tmp_path / f"s{step}"
        server, again, done = Server(folder), None, False
        name = server.sessions.create("me").id
        server.sessions.append_text("me", name, "the car is blue")
        server.sessions.delete("me", server.sessions.create("me").id)
        left = folder / "contexts" / ("f" * 32 + ".deleted")
        left.mkdir()
        (left / CARD).write_bytes(card_of(replace(read_card(folder / "contexts" / name, name), id="f" * 32)))
        server.die()
        for file in Path(folder).glob("*.json"):
            file.unlink() if step % 2 else None
        with killer.until(step):
            again = Server.__new__(Server)
            again.__init__(folder)
            done = True
        again.die()
        server = Server(folder)
        assert server.state(name)[0] == "the car is blue"
        assert not left.exists()
        server.die()
        if done and step % 2:
            break
    assert step > 3


def test_a_state_folder_that_was_being_made_when_the_server_was_killed_is_used_by_the_next_one(killer, tmp_path):
    for step in counted():
        server, done = Server.__new__(Server), False
        with killer.until(step):
            server.__init__(tmp_path / f"s{step}")
            done = True
        server.die()
        Server(tmp_path / f"s{step}").die()
        if done:
            break
    assert step > 3


def test_a_conversation_that_is_spilled_or_dropped_is_there_or_not_whatever_step_is_the_last(killer, tmp_path):
    for step in counted():
        folder, killer.kept = tmp_path / f"s{step}", tmp_path / f"kept{step}"
        killer.kept.mkdir()
        server = Server(folder)
        held = server.store.new("me", is_session=False)
        held.context.append(SECRET)
        done = False
        with killer.until(step):
            server.store._spill(held)
            found = server.store.get("me", held.id, is_session=False)
            assert found.context.text == SECRET
            server.store.forget(found)
            done = True
        server.die()
        server = Server(folder)
        for candidate in list(server.store.candidates("me")):
            found = server.store.get("me", candidate.id, is_session=False)
            assert found.context.text == SECRET
            server.store.forget(found)
        assert list((folder / "contexts").iterdir()) == []
        left = readable_bytes(killer.versions())
        assert SECRET.encode() not in left
        assert str(make_tokenizer().encode(SECRET))[1:-1].encode() not in left
        server.die()
        if done:
            break
    assert step > 10


def test_nothing_stays_of_a_server_without_a_state_folder_after_the_next_start_whatever_step_is_the_last(
    killer, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "kveraser-of-mine").mkdir()
    (tmp_path / "tmp" / "kveraser-of-mine" / "notes.txt").write_text("notes")
    for step in counted():
        killer.kept = tmp_path / f"kept{step}"
        killer.kept.mkdir()
        server, done = Server.__new__(Server), False
        with killer.until(step):
            server.__init__(None)
            name = server.sessions.create("me").id
            server.sessions.append_text("me", name, SECRET)
            server.store.close()
            done = True
        server.die()
        for folder in (tmp_path / "tmp").iterdir():
            os.utime(folder, (0, 0))  # long ago
        again = Server(None)
        (there,) = set((tmp_path / "tmp").iterdir()) - {tmp_path / "tmp" / "kveraser-of-mine"}
        assert there == again.store._disk.folder
        assert SECRET.encode() not in readable_bytes(killer.versions())
        again.store.close()
        again.die()
        if done:
            break
    assert step > 20
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["kveraser-of-mine"]


def test_a_session_that_is_not_there_is_not_found(tmp_path):
    server = Server(tmp_path)
    with pytest.raises(SessionNotFoundError):
        server.sessions.purge("me", "f" * 32, "x")
    server.die()
