"""Writing files so that they are there whole or not at all, and overwriting them.

Knows: the steps of `disk`. Does not know what is in the files.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kveraser.files import disk

_PIECE = 1 << 20
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}")


def write_atomically(file: Path, data: bytes | Iterable[bytes], *, private: bool = False) -> None:
    """Write a file so that it is there whole or not at all, also when the machine stops in between.

    Args:
        data: in one piece or several.
        private: its user alone can read it, whatever the umask: what was said to a model, and what can be told of that.
    """
    disk.make_folder(file.parent)
    partial = partial_name(file)
    handle = disk.create(partial, 0o600 if private else 0o666)
    try:
        try:
            for piece in [data] if isinstance(data, bytes) else data:
                disk.write(handle, piece)
            disk.sync(handle)
        finally:
            os.close(handle)
        disk.replace(partial, file)
    except BaseException:
        disk.remove(partial)
        raise
    disk.sync_folder(file.parent)


def partial_name(file: Path) -> Path:
    """A name, beside a file, for what is to become it."""
    return file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}"


def meant_by(name: str) -> str | None:
    """The name that a partial file of this name was to get; None of a name that no partial file has."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else None


def overwrite(file: Path) -> None:
    """Overwrite a file with zeros, in place: whoever has it under another name has zeros, too. A link is left alone."""
    if file.is_symlink() or not file.is_file():
        return
    handle = disk.open_to_change(file)
    try:
        size = os.fstat(handle).st_size
        for at in range(0, size, _PIECE):
            disk.write(handle, bytes(min(_PIECE, size - at)), at)
        disk.sync(handle)
    finally:
        os.close(handle)


def shred(file: Path) -> None:
    """Overwrite a file, then remove it."""
    overwrite(file)
    disk.remove(file)


@contextmanager
def appearing_whole(file: Path) -> Iterator[Path]:
    """A path to write a large file to; it gets its name when the block ends well, and is removed when it does not."""
    disk.make_folder(file.parent)
    partial = partial_name(file)
    try:
        yield partial
        disk.replace(partial, file)
    finally:
        disk.remove(partial)
