"""The state folder: nothing that is not the server's is touched, nothing of its users is lost, nobody else can read it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest
from serving_helpers import TALK, ask, without

import kveraser as kv
from kveraser.serving.sessions.sessions import Sessions

OLD = Path(__file__).parents[2] / "context" / "sessions" / "transformers"


def session(service, text="the code is 1234", owner="me"):
    sessions = Sessions(service.store, service.limits)
    name = sessions.create(owner).id
    sessions.append_text(owner, name, text)
    return name


def text_of(service, name, owner="me"):
    return Sessions(service.store, service.limits).get(owner, name).context.text


def foreign(folder):
    """Somebody's own files, under several names."""
    for name in ("AuthContext", "0" * 32, "f" * 32 + ".deleted"):
        (folder / name).mkdir(parents=True)
        (folder / name / "precious.txt").write_text(name)
    (folder / "notes.txt").write_text("notes")
    return {path: path.read_text() for path in folder.rglob("*.txt")}


def test_folders_that_are_not_ours_are_never_touched(make_service, tmp_path):
    service = make_service(state_dir=tmp_path)
    name = session(service)
    service.close()
    files = foreign(tmp_path / "contexts")
    service = make_service(state_dir=tmp_path)
    assert text_of(service, name) == "the code is 1234"
    session(service)
    service.close()
    assert {path: path.read_text() for path in files} == files


def test_a_folder_with_files_that_are_not_ours_is_refused_and_left_as_it_is(make_service, tmp_path):
    files = foreign(tmp_path / "contexts")
    tmp_path.chmod(0o755)
    before = sorted((path, path.stat().st_mode) for path in [tmp_path, *tmp_path.rglob("*")])
    with pytest.raises(kv.SessionFileError, match="contexts"):
        make_service(state_dir=tmp_path)
    assert sorted((path, path.stat().st_mode) for path in [tmp_path, *tmp_path.rglob("*")]) == before
    assert {path: path.read_text() for path in files} == files


@pytest.mark.parametrize("harm", ["emptied", "garbled", "removed"])
def test_no_session_depends_on_a_file_beside_its_own(make_service, tmp_path, harm):
    service = make_service(state_dir=tmp_path)
    name, other = session(service), session(service, "the car is blue", "you")
    service.close()
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink() if harm == "removed" else path.write_bytes(b"" if harm == "emptied" else b"\0" * 100)
    service = make_service(state_dir=tmp_path)
    assert (text_of(service, name), text_of(service, other, "you")) == ("the code is 1234", "the car is blue")
    assert Sessions(service.store, service.limits).names("me") == [name]


@pytest.mark.parametrize("content", [b"", b"not a database at all", None])
def test_a_folder_of_version_one_whose_index_is_damaged_is_refused_and_left_as_it_is(make_service, tmp_path, content):
    folder = tmp_path / "contexts" / ("a" * 32)
    folder.mkdir(parents=True)
    (folder / "session.json").write_text("precious")
    if content is not None:
        (tmp_path / "index.sqlite").write_bytes(content)
    with pytest.raises(kv.SessionFileError, match="take a"):
        make_service(state_dir=tmp_path)
    assert (folder / "session.json").read_text() == "precious"
    assert content is None or (tmp_path / "index.sqlite").read_bytes() == content


@pytest.mark.parametrize(("lost", "kept"), [("session.key", "session.kveraser"), ("session.json", "states-*")])
def test_a_session_that_cannot_be_read_is_never_deleted(make_service, tmp_path, caplog, lost, kept):
    service = make_service(state_dir=tmp_path)
    name = session(service)
    service.close()
    if lost == "session.json":  # as an older version wrote it
        for file in (tmp_path / "contexts" / name).glob("session.*"):
            file.unlink()
        shutil.copytree(OLD, tmp_path / "contexts" / name, dirs_exist_ok=True)
    (tmp_path / "contexts" / name / lost).unlink()
    (states,) = (tmp_path / "contexts" / name).glob(kept)
    content = states.read_bytes()
    service = make_service(state_dir=tmp_path)
    assert Sessions(service.store, service.limits).names("me") == []
    assert name in caplog.text
    (kept,) = tmp_path.rglob(states.name)
    assert kept.read_bytes() == content


def test_what_a_crash_leaves_half_written_or_half_deleted_is_removed(make_service, tmp_path, monkeypatch):
    service = make_service(state_dir=tmp_path)
    ask(service, TALK)
    name = session(service)
    monkeypatch.setattr(Path, "rmdir", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Sessions(service.store, service.limits).delete("me", name)
    monkeypatch.undo()
    service.close()
    (conversation,) = (tmp_path / "contexts").glob("[0-9a-f]*/session.kveraser")
    conversation.unlink()  # as if the crash had come before it was written
    service = make_service(state_dir=tmp_path)
    assert list((tmp_path / "contexts").iterdir()) == []
    assert Sessions(service.store, service.limits).names("me") == []
    assert ask(service, TALK).reuse.method == "prefill"


def test_a_damaged_session_can_be_deleted_by_its_owner(make_service, tmp_path):
    service = make_service(state_dir=tmp_path)
    name = session(service)
    service.close()
    file = tmp_path / "contexts" / name / "session.kveraser"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    service = make_service(state_dir=tmp_path)
    sessions = Sessions(service.store, service.limits)
    with pytest.raises(kv.SessionFileError):
        sessions.get("me", name)
    with pytest.raises(kv.errors.SessionNotFoundError, match=name):
        sessions.delete("somebody else", name)
    assert file.exists()
    sessions.delete("me", name)
    assert sessions.names("me") == []
    assert not any(name in str(path) for path in tmp_path.rglob("*"))


def test_a_deleted_session_does_not_come_back(make_service, tmp_path):
    service = make_service(state_dir=tmp_path)
    name = session(service)
    Sessions(service.store, service.limits).delete("me", name)
    service.close()
    assert Sessions((again := make_service(state_dir=tmp_path)).store, again.limits).names("me") == []
    assert not any(name in str(path) for path in tmp_path.rglob("*"))


def test_a_folder_of_version_one_is_taken_over_with_its_sessions_and_conversations(make_service, tmp_path):
    service = make_service(state_dir=tmp_path)
    reply = ask(service, TALK)
    name = session(service)
    held = {held.id: held for held in service.store._held.values()}
    rows = [(key, one.owner, int(one.is_session), (np.empty(0, np.int64) if one.is_session else one.view.ids).tobytes(),
             "[]", one.prompt_end, 1, 1.0) for key, one in held.items()]  # fmt: skip
    service.close()
    for path in [*tmp_path.glob("*.json"), *(tmp_path / "contexts").glob("*/kveraser-context.json")]:
        path.unlink()
    db = sqlite3.connect(tmp_path / "index.sqlite")
    db.execute(
        "CREATE TABLE contexts (id TEXT PRIMARY KEY, owner TEXT NOT NULL, explicit INTEGER NOT NULL, ids BLOB NOT NULL, "
        "placeholders TEXT NOT NULL, prompt_end INTEGER NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL)"
    )
    db.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    service = make_service(state_dir=tmp_path)
    assert text_of(service, name) == "the code is 1234"
    again = ask(service, TALK)
    assert (again.reuse.method, again.text) == ("prefix", reply.text)
    assert not list(tmp_path.glob("index.sqlite*"))


@pytest.mark.parametrize("version", ["today", "without checksums"])
def test_a_conversation_whose_card_was_altered_is_neither_used_nor_removed(make_service, tmp_path, caplog, version):
    service = make_service(state_dir=tmp_path)
    reply = ask(service, TALK)
    service.close()
    (card,) = tmp_path.rglob("kveraser-context.json")
    body = json.loads(card.read_text())["body"]
    if version != "today":
        card.write_text(json.dumps({**body, "format": 2}))
    else:
        card.write_text(card.read_text().replace(f'"ids": [{body["ids"][0]},', f'"ids": [{body["ids"][0] + 1},'))
    service = make_service(state_dir=tmp_path)
    again = ask(service, TALK)
    assert (again.reuse.method, again.text) == ("prefix" if version != "today" else "prefill", reply.text)
    assert ("was altered" in caplog.text) == (version == "today")
    assert card.exists() or version != "today"


def test_a_newer_format_is_refused(make_service, tmp_path):
    make_service(state_dir=tmp_path).close()
    (marker,) = tmp_path.glob("*.json")
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    with pytest.raises(kv.SessionFileError, match="format 99"):
        make_service(state_dir=tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("given", ["none", "state-dir"])
def test_nobody_else_on_the_machine_can_read_anything_whatever_the_umask_and_the_folder_were(
    make_service, tmp_path, monkeypatch, given
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = None if given == "none" else tmp_path / "state"
    if folder:
        folder.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        service = make_service(state_dir=folder, cache_budget=200_000)
        for number in range(4):  # more than fits: some go to disk
            ask(service, [("user", f"{number} {TALK[4][1]}")])
        ask(service, without(TALK, 4))
        session(service)
        assert service.store.count[1] > 0
        if folder:
            service.close()
            for path in folder.rglob("*"):
                path.chmod(0o777 if path.is_dir() else 0o666)  # as an older version left it
            folder.chmod(0o755)
            service = make_service(state_dir=folder)
            session(service)
        paths = list(tmp_path.rglob("*"))
        assert len(paths) > 6
        open_to_others = [str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]
        assert open_to_others == []
    finally:
        os.umask(before)


def test_the_temporary_folder_of_a_server_that_was_killed_is_removed_at_the_next_start(
    make_service, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    service = make_service()
    session(service)
    (killed,) = tmp_path.glob("kveraser-*")
    (tmp_path / "kveraser-of-mine").mkdir()
    (tmp_path / "kveraser-of-mine" / "notes.txt").write_text("notes")
    running = make_service()  # while the first one still runs
    assert killed.exists()
    service.store._disk._lock.release()  # as a kill does
    make_service()
    assert not killed.exists()
    assert (tmp_path / "kveraser-of-mine" / "notes.txt").exists()
    assert text_of(running, session(running)) == "the code is 1234"
