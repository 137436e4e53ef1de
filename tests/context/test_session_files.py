"""Saved sessions: whole after a kill at any step, unreadable in every version after a purge; also those of format 1."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from files_helpers import counted, killing_disk, readable_bytes
from kinds import KINDS
from kveraser.files import disk

SECRET = "xylophone quartz"
OLD = Path(__file__).parent / "sessions" / "transformers"
TOY = KINDS[-1]


@pytest.fixture
def killer(tmp_path, monkeypatch):
    with killing_disk(tmp_path / "kept", monkeypatch) as found:
        yield found


def talk(kind=TOY):
    ctx = kind.text_context()
    ctx.append_message("user", "hello there")
    ctx.append_message("tool", SECRET, id="secret")
    ctx.append_message("user", "the car is blue and it is fast")
    return ctx


def load(folder, kind=TOY):
    return kind.load(folder, kind.text_context())


def states_of(ctx, span):
    """The secret's own bytes: its states, which are in the files only as long as it is."""
    return [row.numpy().tobytes() for row in ctx.backend.rows[ctx._ledger.span_to_cache(span).slice]]


def test_the_tool_of_these_tests_reads_every_version_as_long_as_its_key_is_there(killer, tmp_path):
    ctx = talk()
    state = states_of(ctx, ctx.messages[1][1])[0]
    for more in ("one", "two"):
        ctx.append_message("user", more)
        ctx.save(tmp_path / "s")
    with killer.until(3):  # in the middle of writing a third one
        ctx.save(tmp_path / "s")
    found = readable_bytes(killer.versions())
    assert found.count(SECRET.encode()) == 2 + (found.count(state) > 2)
    assert found.count(state) >= 2
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in killer.versions())


def test_a_save_that_is_killed_at_any_step_leaves_the_old_session_or_the_new_one(killer, tmp_path):
    ctx = talk()
    before = ctx.text
    ctx.save(tmp_path / "s")
    for step in counted():
        ctx.append_message("user", f"number {step}")
        with killer.until(step):
            ctx.save(tmp_path / "s")
            break
        loaded = load(tmp_path / "s")
        assert loaded.text in (before, ctx.text)
        loaded.append("more")
        loaded.save(tmp_path / "s")
        ctx = load(tmp_path / "s")
        before = ctx.text
    assert load(tmp_path / "s").text == ctx.text
    assert step > 4


def test_a_first_save_that_is_killed_at_any_step_can_be_done_again(killer, tmp_path):
    ctx = talk()
    for step in counted():
        folder = tmp_path / f"s{step}"
        with killer.until(step):
            ctx.save(folder)
            break
        ctx.save(folder)
        assert load(folder).text == ctx.text
    assert step > 5


@pytest.mark.parametrize("how", ["loaded", "saved"])
def test_a_purge_that_is_killed_at_any_step_loses_nothing_and_once_repeated_the_secret_is_in_no_version(
    killer, tmp_path, how
):
    for step in counted():
        ctx, folder = talk(), tmp_path / f"s{step}"
        kept = killer.kept = tmp_path / f"kept{step}"
        kept.mkdir()
        secret = [SECRET.encode(), *states_of(ctx, ctx.messages[1][1])]
        for _ in range(2):
            ctx.save(folder)
        receipt = ctx.erase("secret")
        ctx.save(folder)
        ctx = load(folder) if how == "loaded" else ctx
        text, done = ctx.text, False
        with killer.until(step):
            ctx.purge(ctx.receipts[0])
            done = True
        if not done:
            ctx = load(folder)
            assert ctx.text == text
            assert len(ctx) == len(talk())
            if ctx.receipts:
                ctx.purge(ctx.receipts[0])
            with pytest.raises(kv.RestoreError):
                ctx.purge(receipt)
        found = readable_bytes(killer.versions())
        assert [part for part in secret if part in found] == []
        assert SECRET not in load(folder).text_of(receipt.span)
        ctx.append("more")
        ctx.save(folder)
        assert load(folder).text == ctx.text
        if done:
            break
    assert step > 6


def test_two_kills_in_a_row_leave_no_secret_either(killer, tmp_path):
    for first in range(12):
        ctx, folder = talk(), tmp_path / f"s{first}"
        killer.kept = tmp_path / f"kept{first}"
        killer.kept.mkdir()
        ctx.save(folder)
        ctx.erase("secret")
        ctx.save(folder)
        with killer.until(first):
            ctx.purge(ctx.receipts[0])
        for second in range(16):
            with killer.until(second):
                ctx = load(folder)
                if ctx.receipts:
                    ctx.purge(ctx.receipts[0])
        ctx = load(folder)
        assert ctx.receipts == ()
        assert SECRET.encode() not in readable_bytes(killer.versions())


def test_a_purge_whose_files_cannot_be_written_is_gone_on_with_by_purging_again(tmp_path, monkeypatch):
    ctx = talk()
    for name in ("a", "b"):
        ctx.save(tmp_path / name)
    receipt = ctx.erase("secret")
    real = disk.write

    def full(handle, data, at=None):
        if len(data) > 100:
            raise OSError(28, "No space left on device")
        real(handle, data, at)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(OSError, match="No space"):
        ctx.purge(receipt)
    monkeypatch.undo()
    assert SECRET in load(tmp_path / "a").text
    ctx.purge(receipt)
    for name in ("a", "b"):
        loaded = load(tmp_path / name)
        assert loaded.text == ctx.text
        assert loaded.text_of(receipt.span) == ""
    with pytest.raises(kv.RestoreError, match="purge"):
        ctx.purge(receipt)


@pytest.mark.parametrize("saved", [False, True])
def test_an_erase_without_purge_can_be_purged_later_directly(tmp_path, saved):
    ctx = talk()
    receipt = ctx.erase("secret")
    ctx.append("and more of it")
    if saved:
        ctx.save(tmp_path / "s")
        ctx = load(tmp_path / "s")
    ctx.purge(receipt)
    assert ctx.exact
    assert ctx.text_of(receipt.span) == ""
    assert not saved or load(tmp_path / "s").text_of(receipt.span) == ""


def test_a_purge_never_rewrites_a_folder_that_another_context_has_saved_since(tmp_path):
    ctx = talk()
    receipt = ctx.erase("secret")
    ctx.save(tmp_path / "s")
    other = load(tmp_path / "s")
    other.append("what the other one has read")
    other.save(tmp_path / "s")
    with pytest.raises(kv.SessionFileError, match="saved to .* since"):
        ctx.purge(receipt)
    assert SECRET in ctx.text_of(receipt.span)  # nothing was changed
    assert load(tmp_path / "s").text == other.text
    other.purge(other.receipts[0])
    ctx.purge(receipt)
    assert load(tmp_path / "s").text == other.text
    assert ctx.text_of(receipt.span) == ""


def test_a_session_that_another_one_replaces_cannot_be_read_any_more(killer, tmp_path):
    ctx = talk()
    ctx.save(tmp_path / "s")
    other = TOY.text_context()
    other.append("something else")
    other.save(tmp_path / "s")
    assert SECRET.encode() not in readable_bytes(killer.versions())
    ctx.purge(ctx.erase("secret"))
    assert load(tmp_path / "s").text == "something else"


def test_a_folder_that_is_gone_or_emptied_is_not_made_again_by_a_purge(killer, tmp_path):
    ctx = talk()
    for name in ("gone", "emptied"):
        ctx.save(tmp_path / name)
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "emptied" / "session.kveraser").unlink()
    killer.keep(tmp_path / "emptied")
    ctx.purge(ctx.erase("secret"))
    assert not (tmp_path / "gone").exists()
    assert not (tmp_path / "emptied" / "session.kveraser").exists()
    assert not any((tmp_path / "emptied" / "session.key").read_bytes())


def test_a_file_system_without_hard_links_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    ctx = talk()
    ctx.save(tmp_path / "s")
    ctx.purge(ctx.erase("secret"))
    assert load(tmp_path / "s").text == ctx.text


def test_a_file_system_without_locks_is_enough(killer, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="other systems lock in other ways")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    ctx = talk()
    ctx.save(tmp_path / "s")
    ctx.purge(ctx.erase("secret"))
    assert load(tmp_path / "s").text == ctx.text
    assert SECRET.encode() not in readable_bytes(killer.versions())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_saved_session_is_readable_by_its_user_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        talk().save(tmp_path / "s")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "s").iterdir()} == {0o600}


# -- format 1 --------------------------------------------------------------------------------------------------------


def old_session(folder):
    model = text_model()
    return kv.ErasableContext.load(folder, model, make_tokenizer(), random_eraser(model))


@pytest.mark.parametrize("how", ["saved", "purged"])
def test_a_plain_session_of_format_one_is_overwritten_once_it_is_there_in_the_new_form_whatever_step_is_the_last(
    killer, tmp_path, how
):
    states = next(OLD.glob("states-*")).read_bytes()
    plain = [b"the code is 1234", b'"role": "tool"', states[-200:]]
    for step in counted():
        folder, killer.kept = tmp_path / f"s{step}", tmp_path / f"kept{step}"
        killer.kept.mkdir()
        shutil.copytree(OLD, folder)
        (folder / ".former-session.json").write_bytes((folder / "session.json").read_bytes())
        (folder / ".states-c82040b12ad2cb28.safetensors.ab_3d").write_bytes(states)  # as kills left them
        killer.keep(folder)
        ctx = old_session(folder)
        text, done = ctx.text, False
        with killer.until(step):
            if how == "saved":
                ctx.save(folder)
            else:
                ctx.purge(next(receipt for receipt in ctx.receipts if "1234" in ctx.text_of(receipt.span)))
            done = True
        ctx = old_session(folder)
        assert ctx.text == text
        if not (folder / "session.kveraser").exists():
            assert all(part in b"".join(file.read_bytes() for file in killer.versions()) for part in plain)
            ctx.save(folder)
        found = b"".join(file.read_bytes() for file in killer.versions())
        assert [part for part in plain if part in found] == []
        assert sorted(file.name for file in folder.iterdir()) == ["session.key", "session.kveraser"]
        if done:
            break
    assert step > 10
    if how == "purged":
        assert b"the code is 1234" not in readable_bytes(killer.versions())


def test_a_session_that_an_older_version_has_saved_since_is_not_removed(tmp_path):
    shutil.copytree(OLD, tmp_path / "s")
    ctx = old_session(tmp_path / "s")
    ctx.save(tmp_path / "s")
    shutil.copytree(OLD, tmp_path / "s", dirs_exist_ok=True, copy_function=shutil.copyfile)
    old_session(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "session.json").read_bytes())["format"] == 1


def test_files_of_somebody_else_in_the_folder_are_left_alone(tmp_path):
    mine = {"session.json": '{"sha256": "of mine"}', "states-of-the-art.txt": "notes", ".session.txt": "notes"}
    (tmp_path / "s").mkdir()
    for name, text in mine.items():
        (tmp_path / "s" / name).write_text(text)
    ctx = talk()
    ctx.save(tmp_path / "s")
    ctx.purge(ctx.erase("secret"))
    ctx = load(tmp_path / "s")
    ctx.save(tmp_path / "s")
    assert {name: (tmp_path / "s" / name).read_text() for name in mine} == mine
