"""A file that one process holds at a time, for as long as it lives.

Knows: the operating system's file locks, which end with the process, however it ends. Does not know what is locked.
"""

from __future__ import annotations

import os
from pathlib import Path


class FileLock:
    """Holds a file, which is made when it is not there, and is readable by its user alone.

    Raises:
        BlockingIOError: another process, or another lock in this one, holds it.
        OSError: it cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            _lock(self._handle)
            if hasattr(os, "fchmod"):
                os.fchmod(self._handle, 0o600)
        except BaseException:
            os.close(self._handle)
            raise

    def read(self) -> bytes:
        """What is in the file."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        return os.read(self._handle, 1 << 16)

    def write(self, data: bytes) -> None:
        """Put something into the file instead of what is there."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, data)
        os.ftruncate(self._handle, len(data))
        os.fsync(self._handle)

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            # Far behind the end of the file, so that others can still read it.
            os.lseek(handle, 1 << 30, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(str(error)) from error
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
