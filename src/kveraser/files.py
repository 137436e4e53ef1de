"""Where kveraser keeps what it can rebuild: converted weights and measured cost models.

Knows: folders, atomic writing. Does not know what is in the files.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$KVERASER_CACHE`, else `kveraser` in the user's cache folder."""
    if override := os.environ.get("KVERASER_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "kveraser"


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also when the machine stops in between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def appearing_whole(file: Path) -> Iterator[Path]:
    """A path to write a large file to; it gets its name when the block ends well, and is removed when it does not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
