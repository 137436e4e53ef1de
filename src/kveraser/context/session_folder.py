"""The folder of a saved session: one encrypted file, and the key that opens it.

Knows: files, keys. Does not know what a session says (`session.py`).

    session.kveraser   the session, whole in one file, encrypted; replaced by every save
    session.key        its key, overwritten in place

A purge has to make every older version unreadable, also those that were replaced, half written or left by a crash, whose bytes
nobody finds any more. So it does not look for them, but overwrites the key that opens them. In this order, so that whatever stops
it, the session is there, and the next who opens it finishes:

    1. a new key beside the old one    2. the session with the new key, in place of the old one    3. the old key is overwritten

Sessions of format 1 were plain files: they are read, and overwritten as soon as the folder has the session in this form.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kveraser.context import session_v1
from kveraser.context.session import Session, readable
from kveraser.errors import DamagedError, SessionFileError
from kveraser.files import disk, write_atomically
from kveraser.files.keys import Key, KeyFile, turn_of
from kveraser.files.sealed import head_of, sealed, unsealed
from kveraser.files.writing import shred

FORMAT = 2
FILE = "session.kveraser"
KEYS = "session.key"


@dataclass(frozen=True)
class Version:
    """One save to a folder.

    Attributes:
        salt: no two have the same.
        key: the name of its key; "" where it was not encrypted.
    """

    salt: str
    key: str


def saved_file(folder: Path) -> Path | None:
    """The file that makes a folder a saved session: written last, and replaced by every save; None where there is none."""
    return next((file for name in (FILE, session_v1.INDEX) if (file := folder / name).is_file()), None)


def read_session(folder: Path, stored_as: tuple[str, str]) -> tuple[Session, Version]:
    """Read and check a session; what a purge that was stopped has left to do is done.

    Raises:
        SessionFileError: missing, truncated, altered, its key is gone, or of a newer format.
    """
    with readable(str(folder)):
        if saved_file(folder) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / FILE))
        if not (folder / FILE).exists():
            session, checksum = session_v1.read_session(folder, stored_as)
            return session, Version(checksum, "")
        with KeyFile.held(folder / KEYS) as keys:
            version = _current(folder)
            assert version is not None
            key = keys.find(version.key)
            if key is None:
                raise SessionFileError(
                    f"the key of {folder / FILE} is not in {folder / KEYS}: the session cannot be read without it"
                )
            index, data = unsealed(folder / FILE, key)
            with suppress(OSError):  # a folder that can only be read
                _finish(folder, keys, key, stored_as)
            return Session.of_bytes(index, data, stored_as), version


def write_session(folder: Path, session: Session, known: Version | None = None, *, renew: bool = False) -> Version:
    """Save a session to a folder, whole or not at all.

    Args:
        known: the version that the writer has read or written; another one that is there instead cannot be read any more afterwards.
        renew: neither can any older one.

    Raises:
        SessionFileError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SessionFileError(f"{folder} is a file; a session is saved to a folder")
    disk.make_folder(folder)
    with KeyFile.held(folder / KEYS, make=True) as keys:
        return _write(folder, keys, session, known, renew=renew)


def check_purge(folder: Path, known: Version) -> None:
    """Whether the older versions in a folder can be made unreadable by whoever knows that version.

    Raises:
        SessionFileError: another context has saved to it since, with the same key.
    """
    with readable(str(folder)):
        now = _current(folder)
        if now is not None and now != known and now.key == known.key:
            raise SessionFileError(
                f"another context was saved to {folder} since; load it from there and purge it there, or remove the folder. "
                "Then purge this one"
            )


def purge_session(folder: Path, session: Session, known: Version) -> Version | None:
    """Save a session in place of the version that its writer knows, and make that and all older ones unreadable.

    Returns:
        The version that was written; None where something else is in the folder, or nothing: older ones are then
        unreadable, too.

    Raises:
        SessionFileError: as of `check_purge`; nothing was changed.
    """
    if saved_file(folder) is None and not (folder / KEYS).exists():
        return None
    with KeyFile.held(folder / KEYS, make=True) as keys:
        check_purge(folder, known)
        now = _current(folder)
        if now == known:
            return _write(folder, keys, session, known, renew=True)
        if now is None:
            keys.drop_all_but(None)
        return None


def destroy(folder: Path) -> None:
    """Remove what of a folder is a session's, so that nothing of it can be read any more."""
    shred(folder / KEYS)
    _tidy(folder)
    disk.remove(folder / FILE)


def _write(folder: Path, keys: KeyFile, session: Session, known: Version | None, *, renew: bool) -> Version:
    """The steps above; without a new key where the old one will do."""
    try:
        now = _current(folder)
    except (DamagedError, SessionFileError):  # to be replaced
        now, renew = None, True
    old = keys.find(now.key) if now is not None else None
    key = keys.add(old, 0 if now is None else turn_of(now.key)) if renew or old is None or now != known else old
    write_atomically(
        folder / FILE, sealed({"kveraser": "session", "format": FORMAT}, session.to_bytes(), key), private=True
    )
    _finish(folder, keys, key, session.stored_as)
    version = _current(folder)
    assert version is not None
    return version


def _finish(folder: Path, keys: KeyFile, key: Key, stored_as: tuple[str, str]) -> None:
    """What is left to do once a session is there with its key; nothing mostly."""
    if keys.locked:
        keys.drop_all_but(key)
        _tidy(folder, stored_as)
    else:  # somebody may be writing with a newer key
        keys.drop_before(key.turn)


def _current(folder: Path) -> Version | None:
    """The version that is in a folder; None where there is none.

    Raises:
        SessionFileError: of a newer format.
        DamagedError: its first line cannot be read.
    """
    file = folder / FILE
    if not file.exists():
        checksum = session_v1.checksum_of(folder)
        return None if checksum is None else Version(checksum, "")
    head = head_of(file)
    form = head.get("format", 0)
    if form != FORMAT:
        raise SessionFileError(f"{file} has format {form}, this version reads {FORMAT}; update kveraser")
    return Version(head["salt"], head["key"])


def _tidy(folder: Path, stored_as: tuple[str, str] | None = None) -> None:
    """Remove what a save that was stopped left, and overwrite what is left of format 1."""
    for file in folder.glob(f".{FILE}.*"):
        disk.remove(file)
    whole, older = folder / FILE, folder / session_v1.INDEX
    if whole.exists() and session_v1.checksum_of(folder) and older.stat().st_mtime_ns > whole.stat().st_mtime_ns:
        return  # saved since, by an older version of kveraser
    for file in session_v1.files(folder, stored_as):
        shred(file)
