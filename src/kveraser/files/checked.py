"""JSON with its format and checksum around it, `{"format": 1, "sha256": "...", "body": {...}}`; checksums of JSON and of files.

Knows: JSON and SHA-256. Does not know what the body says. A checksum tells damage, not malice: who can write the file can write that, too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kveraser.errors import DamagedError


def enclosed(body: dict[str, Any], form: int, *, name: str = "body", indent: int | None = None) -> bytes:
    """The bytes of a file that says `body`, which is called `name` in it, in format `form`."""
    return json.dumps({"format": form, "sha256": digest_json(body), name: body}, indent=indent).encode()


def opened(envelope: dict[str, Any], newest: int, what: object, *, name: str = "body") -> dict[str, Any]:
    """The body that `enclosed` was given.

    Args:
        newest: the newest format that can be read.
        what: what errors call it.

    Raises:
        DamagedError: it was altered, or is of a newer format.
        KeyError, TypeError: it is no such envelope.
    """
    form, body = envelope["format"], envelope[name]
    if form > newest:
        raise DamagedError(f"{what} has format {form}, this version reads {newest}; update kveraser")
    if envelope["sha256"] != digest_json(body):
        raise DamagedError(f"{what} was altered: its checksum does not fit")
    if not isinstance(body, dict):
        raise TypeError(f"{what} holds {type(body).__name__} and no object")
    return body


def digest_json(value: object) -> str:
    """SHA-256 of what can be written as JSON, in whatever order its keys are."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
