"""The folders of a run: held by one run at a time, results replaced whole, and what the disk refuses said in words.

Knows: files, locks. Does not know what is in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kveraser.errors import TrainingError
from kveraser.files.locks import try_lock

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to one run, which ends with the process at the latest.

    Raises:
        TrainingError: another run has it, or it cannot be made.
    """
    with saving(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("ab")
    with lock:
        if not try_lock(lock.fileno()):
            raise TrainingError(f"another run is training in {folder}; wait for it, or give another output folder")
        yield


@contextmanager
def saving(what: str, consolation: str = "Make room, and the same command goes on") -> Iterator[None]:
    """Raise `TrainingError` for what the disk refuses: no room, no permission, a file where a folder belongs."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot {what}: {error}. {consolation}") from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder, to be made, that takes the place of `target` when the block ends well, and is removed when it does not.

    Killed between the two renames, it leaves what `recover` brings back.
    """
    fresh, old = target.with_name(f".{target.name}.new"), _old(target)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover(target: Path) -> None:
    """Bring back the folder that was in its place when a run was killed while replacing it."""
    if not target.exists() and _old(target).exists():
        _old(target).rename(target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
