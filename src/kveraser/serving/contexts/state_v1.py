"""The index of a state folder as version 1 wrote it: an SQLite file beside the contexts.

Knows: that file. Does not know what is done with what it says; only read, and removed once it is not needed.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from kveraser.files.writing import shred

INDEX = "index.sqlite"
FORMAT = 1


@dataclass(frozen=True)
class RowV1:
    """A context in the index; the names are those of `StoredContext`."""

    id: str
    owner: str
    is_session: bool
    ids: bytes
    prompt_end: int


def read_index(folder: Path) -> list[RowV1]:
    """All rows.

    Raises:
        BlockingIOError: a server of that version holds it.
        ValueError: it is damaged, or no such index.
    """
    db = sqlite3.connect(folder / INDEX, isolation_level=None, timeout=0.5)
    try:
        db.execute("BEGIN EXCLUSIVE")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            raise ValueError(f"its format is {found} and not {FORMAT}")
        rows = db.execute("SELECT id, owner, explicit, ids, prompt_end FROM contexts").fetchall()
        return [RowV1(name, owner, bool(kind), ids, end) for name, owner, kind, ids, end in rows]
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise BlockingIOError(str(error)) from error
        raise ValueError(str(error)) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(str(error)) from error
    finally:
        db.close()


def remove_index(folder: Path) -> None:
    """Overwrite and remove the index and its journals, which others could read and which keep ids that were deleted."""
    for file in folder.glob(f"{INDEX}*"):
        shred(file)
