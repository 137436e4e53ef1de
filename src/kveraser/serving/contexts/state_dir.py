"""The folder of `--state-dir`: an SQLite index, and one folder for each context.

Knows: files and owners (digests of API keys). Does not know about HTTP, models or what a context means.

A context is there when its row is: a folder is written whole before its row is entered, and a row is gone before its folder
is. What a crash leaves in between has no row and is removed at the next start.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kveraser.errors import SessionFileError
from kveraser.serving.contexts.matching import Ids

INDEX = "index.sqlite"
FORMAT = 1


@dataclass(frozen=True)
class StoredContext:
    """One row: a context on disk.

    Attributes:
        id: also the name of its folder.
        owner: digest of the API key it belongs to.
        is_session: made through the session API; else a cached conversation.
        ids: of a cached conversation, as a request would give them; empty for a session.
        placeholders: ledger positions where a placeholder stands for an erased span.
        prompt_end: where in `ids` the last reply begins.
        bytes: on disk.
        used: seconds since the epoch.
    """

    id: str
    owner: str
    is_session: bool
    ids: Ids
    placeholders: tuple[int, ...]
    prompt_end: int
    bytes: int
    used: float


class StateDir:
    """The index and the folders below one folder. For one process; used from one thread at a time.

    Raises:
        SessionFileError: the folder is in use by another server, or of a newer format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contexts = folder / "contexts"
        self._contexts.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / INDEX, check_same_thread=False, isolation_level=None, timeout=0.5)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute("BEGIN EXCLUSIVE")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT):
                raise SessionFileError(
                    f"{folder} has format {found}, this version writes {FORMAT}; take another folder"
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS contexts (id TEXT PRIMARY KEY, owner TEXT NOT NULL, explicit INTEGER "
                "NOT NULL, ids BLOB NOT NULL, placeholders TEXT NOT NULL, prompt_end INTEGER NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL)"
            )
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._db.close()
            raise SessionFileError(f"{folder} is in use by another server, or cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise SessionFileError(f"{folder / INDEX} is damaged ({error}); take another folder") from error
        known = {entry.id for entry in self}
        for path in self._contexts.iterdir():
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    def __iter__(self) -> Iterator[StoredContext]:
        rows = self._db.execute(
            "SELECT id, owner, explicit, ids, placeholders, prompt_end, bytes, used FROM contexts ORDER BY used"
        )
        for name, owner, explicit, ids, placeholders, end, size, used in rows.fetchall():
            tokens = np.frombuffer(ids, dtype=np.int64)
            yield StoredContext(name, owner, bool(explicit), tokens, tuple(json.loads(placeholders)), end, size, used)

    def path(self, name: str) -> Path:
        """The folder of a context."""
        return self._contexts / name

    def enter(
        self, name: str, owner: str, is_session: bool, ids: Ids, placeholders: tuple[int, ...], prompt_end: int
    ) -> StoredContext:
        """Enter a context whose folder has been written whole."""
        size = sum(file.stat().st_size for file in self.path(name).iterdir())
        row = StoredContext(name, owner, is_session, ids, placeholders, prompt_end, size, time.time())
        self._db.execute(
            "INSERT OR REPLACE INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (name, owner, is_session, ids.tobytes(), json.dumps(placeholders), prompt_end, size, row.used),
        )
        return row

    def remove(self, name: str) -> None:
        """Forget a context, then delete its folder."""
        self._db.execute("DELETE FROM contexts WHERE id = ?", (name,))
        shutil.rmtree(self.path(name), ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()
