"""Saved sessions of format 1, which were not encrypted: `session.json`, and a file of states named after its checksum.

Knows: that format. Does not know how sessions are written now; these are only read, and removed once they are not needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from kveraser.context.session import Session
from kveraser.errors import SessionFileError
from kveraser.files import opened

FORMAT = 1
INDEX = "session.json"
_STATES = re.compile(r"\.?[a-z]+-[0-9a-f]{16}\.[a-z]+(\.\w+)?")


def read_session(folder: Path, stored_as: tuple[str, str]) -> tuple[Session, str]:
    """Read and check a session; also its checksum.

    Raises:
        SessionFileError: its states are truncated or altered.
        DamagedError: its index is altered, or of a newer format.
        OSError, ValueError, KeyError, TypeError: missing, or something else.
    """
    index_file = folder / INDEX
    envelope = json.loads(index_file.read_text(encoding="utf-8"))
    body = opened(envelope, FORMAT, index_file, name="session")
    expected = body[stored_as[0]]
    file = folder / str(expected["file"])
    if file.parent != folder:
        raise SessionFileError(f"{index_file} names a states file outside its folder: {expected['file']}")
    data = file.read_bytes()
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise SessionFileError(
            f"{file} is truncated or altered ({len(data)} of {expected['bytes']} bytes, or another checksum)"
        )
    return Session(body, data, stored_as), envelope["sha256"]


def checksum_of(folder: Path) -> str | None:
    """Tells one saved session from another; None where there is none that can be read."""
    try:
        envelope = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return str(envelope["sha256"]) if {"format", "session"} <= envelope.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def files(folder: Path, stored_as: tuple[str, str] | None = None) -> Iterator[Path]:
    """What that version has left in a folder, also where it was stopped.

    Args:
        stored_as: of which backend; None for any.
    """
    for file in sorted(folder.iterdir()):
        name = file.name
        states = _STATES.fullmatch(name) and (stored_as is None or name.lstrip(".").startswith(f"{stored_as[0]}-"))
        index = name == INDEX and (checksum_of(folder) is not None or _is_half_overwritten(file))
        if states or index or name == f".former-{INDEX}" or name.startswith(f".{INDEX}."):
            yield file


def _is_half_overwritten(file: Path) -> bool:
    with file.open("rb") as stream:
        return not any(stream.read(1))
