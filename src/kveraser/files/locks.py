"""A file that one holds at a time, for as long as the process lives.

Knows: the operating system's file locks, which end with the process, however it ends. Does not know what is locked.
"""

from __future__ import annotations

import errno
import os
import time

_NONE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""What file systems say that have no locks."""


def lock(handle: int) -> None:
    """Hold an open file until it is closed.

    Raises:
        BlockingIOError: somebody else, or another handle of this process, holds it.
    """
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


def try_lock(handle: int) -> bool:
    """Hold an open file until it is closed, unless somebody else does; where the file system has no locks, nobody can."""
    try:
        lock(handle)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE:
            raise
    return True


def wait_for_lock(handle: int) -> bool:
    """Hold an open file as soon as nobody else does; False where the file system has no locks."""
    while True:
        try:
            lock(handle)
            return True
        except BlockingIOError:
            time.sleep(0.005)
        except OSError as error:
            if error.errno not in _NONE:
                raise
            return False
