"""The file that says that a state folder is held, for as long as the server lives, and what it is.

Knows: locked files. Does not know what the folder is for.
"""

from __future__ import annotations

import os
from pathlib import Path

from kveraser.files import disk
from kveraser.files.locks import lock


class FileLock:
    """Holds a file, which is made when it is not there, and is readable by its user alone.

    Raises:
        BlockingIOError: another process, or another lock in this one, holds it.
        OSError: it cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._handle = disk.create(file)
        except FileExistsError:
            self._handle = disk.open_to_change(file)
        try:
            lock(self._handle)
            if os.fstat(self._handle).st_mode & 0o777 != 0o600:
                disk.protect(file, 0o600)
        except BaseException:
            os.close(self._handle)
            raise

    def read(self) -> bytes:
        """What is in the file."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        return os.read(self._handle, 1 << 16)

    def write(self, data: bytes) -> None:
        """Put something into the file instead of what is there."""
        disk.write(self._handle, data, 0)
        disk.cut(self._handle, len(data))
        disk.sync(self._handle)

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
