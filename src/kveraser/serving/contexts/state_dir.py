"""The folder of `--state-dir`: one folder for each context, which says itself whose it is.

Knows: files and owners (digests of API keys). Does not know about HTTP, models or what a context means.

    DIR/kveraser-state.json             marks the folder as ours; held while a server uses it
    DIR/contexts/ID/kveraser-context.json   the card: marks a context's folder as ours, and says whose it is
    DIR/contexts/ID/session.kveraser, session.key   the context itself, as `ErasableContext.save` writes it
    DIR/contexts/ID.deleted/            on the way out
    DIR/unreadable/ID/                      what could not be read, moved aside

There is no index that could be lost. A context is there when its folder has a card and a saved session, which is written last;
it is gone when its folder is renamed. Only folders with a name *and* a card of ours are ever moved or removed. Everything is
readable by the server's user alone.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from kveraser.context.session_folder import FILE, KEYS, saved_file
from kveraser.errors import SessionFileError
from kveraser.files import disk, write_atomically
from kveraser.serving.contexts.cards import (
    CARD,
    FORMAT,
    NAME,
    StoredContext,
    card_of,
    destroy,
    is_abandoned,
    make_private,
    measured,
    protect,
    read_card,
)
from kveraser.serving.contexts.state_lock import FileLock
from kveraser.serving.contexts.state_v1 import INDEX, read_index, remove_index

log = logging.getLogger("kveraser.serving")

MARKER = "kveraser-state.json"
_MARK = json.dumps({"kveraser": "state", "format": FORMAT}).encode()
_DELETED = ".deleted"
_ASIDE = "unreadable"
_TEMPORARY = "kveraser-"
_STARTING = 60.0  # seconds between the two steps of making a folder, at most


class StateDir:
    """The contexts below one folder. For one process; used from one thread at a time.

    Raises:
        SessionFileError: the folder has files that are not ours, is in use by another server, is of a newer format, or cannot
            be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contexts = folder / "contexts"
        try:
            disk.make_folder(folder, 0o700)
            self._lock = self._take()
            try:
                make_private(folder)
                make_private(self._contexts)
                self._rows = self._tidy()
            except BaseException:
                self._lock.release()
                raise
        except BlockingIOError as error:
            raise SessionFileError(f"{folder} is in use by another server; stop it, or take another folder") from error
        except OSError as error:
            raise SessionFileError(f"{folder} cannot be used as a state folder: {error}") from error

    # -- using it ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[StoredContext]:
        """The contexts that were there at the start, the least recently used first."""
        return iter(self._rows)

    def path(self, name: str) -> Path:
        """The folder of a context."""
        return self._contexts / name

    def write(self, row: StoredContext, write: Callable[[Path], object]) -> StoredContext:
        """Write a context.

        Args:
            row: what is known of it.
            write: writes the context itself into its folder, so that a reader sees the old one or the new one.
        """
        folder = self.path(row.id)
        if not row.is_session:
            self.remove(row.id)  # an older one that could not be removed before: its card says something else
        is_new = not (folder / CARD).exists()
        try:
            if is_new:
                make_private(folder)
                write_atomically(folder / CARD, card_of(row), private=True)
            write(folder)
        except BaseException:
            if is_new and folder.is_dir():
                destroy(folder)
            raise
        return measured(row, folder)

    def remove(self, name: str) -> None:
        """Delete a context; when this returns it is gone. Where it fails, doing it again goes on with what is left of it."""
        folder, deleted = self.path(name), self.path(name + _DELETED)
        if read_card(folder, name) is not None:
            disk.replace(folder, deleted)
        if read_card(deleted, name) is not None or is_abandoned(deleted, name):
            destroy(deleted)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def discard(self) -> None:
        """Let go of the folder and delete it, as far as it is ours."""
        try:
            for folder in (self._contexts, self.folder / _ASIDE):
                for path in list(folder.glob("*")):
                    if read_card(path, path.name) is not None:
                        destroy(path)
                if folder.is_dir():
                    disk.remove_folder(folder)
            disk.remove(self.folder / MARKER)
            disk.remove_folder(self.folder)
        except OSError as error:  # something of somebody else's is in it
            log.warning("%s could not be removed: %s", self.folder, error)
        finally:
            self._lock.release()

    # -- starting ------------------------------------------------------------------------------------------------

    def _take(self) -> FileLock:
        """Hold the folder, if it is ours or empty."""
        marker = self.folder / MARKER
        legacy = (self.folder / INDEX).exists()
        others = sorted(path.name for path in self.folder.iterdir() if path.name != MARKER)
        is_ours = legacy or self._has_cards() or _is_marker(marker)
        if (others and not is_ours) or (marker.exists() and not is_ours and marker.stat().st_size):
            raise SessionFileError(
                f"{self.folder} has files that are not kveraser's ({[*others, MARKER][0]!r} for one); take an empty folder"
            )
        rows = []
        if legacy:
            try:
                rows = read_index(self.folder)
            except ValueError as error:
                raise SessionFileError(
                    f"{self.folder / INDEX} is damaged ({error}); only it knows whose the sessions in "
                    f"{self._contexts} are. Restore it, or take another folder"
                ) from error
        lock = FileLock(marker)
        try:
            self._check_marker(lock)
            for row in rows:
                folder = self.path(row.id)
                if NAME.fullmatch(row.id) and saved_file(folder) is not None:
                    ids = np.frombuffer(row.ids, dtype=np.int64)
                    card = StoredContext(row.id, row.owner, row.is_session, ids, row.prompt_end)
                    write_atomically(folder / CARD, card_of(card), private=True)
            if legacy:
                remove_index(self.folder)
        except BaseException:
            lock.release()
            raise
        return lock

    def _check_marker(self, lock: FileLock) -> None:
        try:
            found = json.loads(lock.read())["format"]
        except (ValueError, KeyError, TypeError):  # new, or damaged: the contexts' cards are what counts
            lock.write(_MARK)
            return
        if found != FORMAT:
            raise SessionFileError(
                f"{self.folder} has format {found}, this version writes {FORMAT}; take another folder"
            )

    def _has_cards(self) -> bool:
        return any(read_card(card.parent, card.parent.name) for card in self._contexts.glob(f"*/{CARD}"))

    def _tidy(self) -> list[StoredContext]:
        """The contexts; what was left half written or half deleted is removed, what cannot be read is moved aside."""
        rows = []
        for folder in sorted(self._contexts.iterdir()):
            name = folder.name.removesuffix(_DELETED)
            row = read_card(folder, name)
            if row is None:
                if is_abandoned(folder, name):
                    destroy(folder)
                continue
            protect(folder)
            if folder.name != name:
                destroy(folder)
            elif (saved := saved_file(folder)) is not None and (saved.name != FILE or (folder / KEYS).is_file()):
                rows.append(measured(row, folder))
            elif row.is_session and _has_more_than_a_beginning(folder):
                self._set_aside(folder)
            else:  # a cached conversation, or a session that was never acknowledged
                destroy(folder)
        return sorted(rows, key=lambda row: row.used)

    def _set_aside(self, folder: Path) -> None:
        aside = self.folder / _ASIDE
        make_private(aside)
        target = aside / folder.name
        disk.replace(folder, target)
        log.warning("files of the session %s are missing; the others were moved to %s", folder.name, target)


def temporary_state_dir() -> StateDir:
    """A state folder for as long as the server runs; those of servers that were killed are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        if not _is_mine(folder):
            continue
        if any((folder / name).is_file() for name in (MARKER, INDEX)):
            with suppress(SessionFileError):  # in use, or not ours
                StateDir(folder).discard()
        elif _is_left_empty(folder):
            with suppress(OSError):
                disk.remove_folder(folder)
    return StateDir(Path(tempfile.mkdtemp(prefix=_TEMPORARY)))


def _has_more_than_a_beginning(folder: Path) -> bool:
    """Whether there is more in a session's folder than what is written before the session itself."""
    return any(file.name not in (CARD, KEYS) and not file.name.startswith(".") for file in folder.iterdir())


def _is_left_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder, and nobody can be about to put something into it."""
    return time.time() - folder.stat().st_mtime > _STARTING and not any(folder.iterdir())


def _is_mine(folder: Path) -> bool:
    """Whether a folder is this user's, and no link: anybody can put something into the folder of temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else None
    return not folder.is_symlink() and folder.is_dir() and user in (None, folder.stat().st_uid)


def _is_marker(file: Path) -> bool:
    """Whether it is the marker of a state folder, or the beginning of one: what a crash leaves of it."""
    try:
        data = file.read_bytes()
        return _MARK.startswith(data) or bool(json.loads(data)["kveraser"] == "state")
    except (OSError, ValueError, KeyError, TypeError):
        return False
