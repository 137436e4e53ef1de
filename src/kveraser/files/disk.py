"""Every change that is made to the files of a session, as one small step each.

Knows: the operating system. Does not know what is in the files, or which steps belong together.

Whoever changes such a file calls a function of this module, by the module's name. So what a program that is killed between any
two steps leaves behind can be tested, step by step.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""What file systems say that cannot sync a folder."""
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it, unless it is there."""
    folder.mkdir(mode, parents=True, exist_ok=True)


def create(file: Path, mode: int = 0o600) -> int:
    """Make a new, empty file; its handle.

    Args:
        mode: who may use it, of those whom the umask lets; by default its user alone.

    Raises:
        FileExistsError: it is there.
    """
    return os.open(file, _FLAGS | os.O_CREAT | os.O_EXCL, mode)


def open_to_change(file: Path) -> int:
    """A handle to change a file that is there; of a link, an `OSError`."""
    return os.open(file, _FLAGS)


def write(handle: int, data: bytes | memoryview, at: int | None = None) -> None:
    """Write all of it, at the end of what was written or at a place."""
    if at is not None:
        os.lseek(handle, at, os.SEEK_SET)
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(handle, rest) :]


def cut(handle: int, length: int) -> None:
    """Let a file end there."""
    os.ftruncate(handle, length)


def sync(handle: int) -> None:
    """Wait until what was written is on the device."""
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the device, where that can be done."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(handle)


def replace(file: Path, name: Path) -> None:
    """Give a file or folder another name; a file that has it already is gone."""
    os.replace(file, name)


def remove(file: Path) -> None:
    """Remove a file, if it is there."""
    file.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove an empty folder."""
    folder.rmdir()


def protect(path: Path, mode: int) -> None:
    """Say who may read it."""
    path.chmod(mode)
