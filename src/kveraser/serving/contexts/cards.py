"""The folder of one context on disk: its card, and that nobody else can read it.

Knows: files. Does not know which contexts there are, or what a context means.

The card, `kveraser-context.json`, marks a folder as ours and says whose the context is. It is written first and deleted last.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kveraser.context import session_folder
from kveraser.errors import DamagedError
from kveraser.files import disk, enclosed, opened
from kveraser.files.writing import shred
from kveraser.serving.contexts.blocks import Ids

log = logging.getLogger("kveraser.serving")

CARD = "kveraser-context.json"
FORMAT = 2
NAME = re.compile(r"[0-9a-f]{32}")
"""What folders of ours are called."""


@dataclass(frozen=True)
class StoredContext:
    """A context on disk.

    Attributes:
        id: also the name of its folder.
        owner: digest of the API key it belongs to.
        is_session: made through the session API; else a cached conversation.
        ids: of a cached conversation, as a request would give them; empty for a session.
        prompt_end: where in `ids` the last reply begins.
        residual: of the edits that it is approximate by, as of a held context.
        edited: whether more is in it than its ids: what was taken out and not purged.
        bytes: on disk.
        used: seconds since the epoch.
    """

    id: str
    owner: str
    is_session: bool
    ids: Ids
    prompt_end: int = 0
    residual: float | None = None
    edited: bool = True
    bytes: int = 0
    used: float = 0.0


def _has_our_name(folder: Path, name: str) -> bool:
    return bool(NAME.fullmatch(name)) and folder.is_dir() and not folder.is_symlink()


def card_of(row: StoredContext) -> bytes:
    """The card of a context."""
    fields = {"kveraser": "context", "id": row.id, "owner": row.owner, "session": row.is_session,
              "ids": row.ids.tolist(), "prompt_end": row.prompt_end, "residual": row.residual, "edited": row.edited}  # fmt: skip
    return enclosed(fields, FORMAT)


def read_card(folder: Path, name: str) -> StoredContext | None:
    """What a folder's card says; None for a folder that is not ours by name and card."""
    if not _has_our_name(folder, name) or (folder / CARD).is_symlink():
        return None
    try:
        said = json.loads((folder / CARD).read_bytes())
        card = opened(said, FORMAT, folder / CARD) if "body" in said else said  # older ones have no checksum
        if (card["kveraser"], card["id"]) != ("context", name):
            return None
        ids = np.asarray(card["ids"], dtype=np.int64)
        residual, edited = card.get("residual"), card.get("edited", True)
        return StoredContext(name, card["owner"], card["session"], ids, card["prompt_end"], residual, edited)
    except DamagedError as error:
        log.warning("%s; what it belongs to is left where it is, and not used", error)
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_abandoned(folder: Path, name: str) -> bool:
    """Whether a folder with a name of ours has nothing in it but what a crash leaves of a card."""
    return _has_our_name(folder, name) and all(file.name.startswith(f".{CARD}.") for file in folder.iterdir())


def measured(row: StoredContext, folder: Path) -> StoredContext:
    """A context with its size and the time of its last change."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    saved = session_folder.saved_file(folder)
    return replace(row, bytes=size, used=0.0 if saved is None else saved.stat().st_mtime)


def make_private(folder: Path) -> None:
    """A folder that its user alone can enter, made when it is not there."""
    disk.make_folder(folder, 0o700)
    if folder.stat().st_mode & 0o777 != 0o700:
        disk.protect(folder, 0o700)


def protect(folder: Path) -> None:
    """Have a context's folder and files readable by their user alone, as older versions did not."""
    make_private(folder)
    for file in folder.iterdir():
        if not file.is_symlink() and file.is_file() and file.stat().st_mode & 0o777 != 0o600:
            disk.protect(file, 0o600)


def destroy(folder: Path) -> None:
    """Delete a context's folder, so that nothing of it can be read any more: first its key is overwritten. Its card goes last, so
    that what is left after a crash is still known as ours."""
    session_folder.destroy(folder)
    for file in folder.iterdir():
        if file.name != CARD and (file.is_symlink() or not file.is_dir()):
            (shred if file.name.startswith(f".{CARD}.") else disk.remove)(file)
    if (folder / CARD).is_file():  # half overwritten it would be no card, and nobody's
        gone = folder / f".{CARD}.gone"
        disk.replace(folder / CARD, gone)
        shred(gone)
    try:
        disk.remove_folder(folder)
    except OSError as error:  # a folder of somebody else's is in it
        log.warning("%s could not be removed: %s", folder, error)
