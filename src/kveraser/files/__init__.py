"""Files: where kveraser keeps what it can rebuild, writing whole or not at all, and writing what can be made unreadable.

Knows: folders, bytes, ciphers. Does not know what is in the files.

    disk      every change to a file, one small step each      writing   whole or not at all; overwriting
    keys      a key file, whose keys are overwritten in place   sealed    files that only such a key opens
    locks     a file that one holds at a time
"""

from __future__ import annotations

import os
from pathlib import Path

from kveraser.files.writing import appearing_whole, write_atomically

__all__ = ["appearing_whole", "cache_folder", "write_atomically"]


def cache_folder() -> Path:
    """`$KVERASER_CACHE`, else `kveraser` in the user's cache folder."""
    if override := os.environ.get("KVERASER_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "kveraser"
