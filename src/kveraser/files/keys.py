"""A file of keys that are overwritten in place, so that what was written with them cannot be read any more.

Knows: two places in a file. Does not know what is encrypted with the keys.

The file is made once, and neither replaced nor removed before its keys are overwritten: whoever has it under another name sees
the keys go, too. A new key goes into the place that is not in use; the key in use is overwritten only once nothing that is
still wanted needs it. Each place is in a page of its own and checksummed: one that was half written holds no key, and cannot harm the other.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kveraser.files import disk
from kveraser.files.locks import wait_for_lock

_RECORD = struct.Struct(">8sQ32s16s")  # what it is, turn, key, checksum
_MAGIC = b"kve-key1"
_PLACES = (0, 4096)


@dataclass(frozen=True)
class Key:
    """A key.

    Attributes:
        turn: later keys have larger ones.
        secret: 32 bytes.
    """

    turn: int
    secret: bytes

    @property
    def name(self) -> str:
        """Says which key it is, and nothing about it."""
        return f"{self.turn}-{hashlib.sha256(b'name' + self.secret).hexdigest()[:16]}"


def turn_of(name: str) -> int:
    """The turn of a key with that name; 0 of no name."""
    return int(name.partition("-")[0] or 0)


class KeyFile:
    """An open key file, held by nobody else meanwhile; see `held`."""

    def __init__(self, handle: int, locked: bool) -> None:
        self._handle = handle
        self.locked = locked
        """Whether nobody else can change it meanwhile; not so where the file system has no locks, or it can only be read."""

    @classmethod
    @contextmanager
    def held(cls, file: Path, *, make: bool = False) -> Iterator[KeyFile]:
        """The key file, for the time of the block.

        Args:
            make: make it if it is not there.

        Raises:
            FileNotFoundError: it is not there.
        """
        handle, can_change = _open(file, make)
        try:
            yield cls(handle, can_change and wait_for_lock(handle))
        finally:
            os.close(handle)

    def find(self, name: str) -> Key | None:
        """The key of that name, if it is still there."""
        return next((key for key in self._keys() if key is not None and key.name == name), None)

    def add(self, keep: Key | None, after: int = 0) -> Key:
        """A new key, in the place that `keep` is not in.

        Args:
            after: its turn is larger than this one, and than all that are there.
        """
        keys = self._keys()
        key = Key(1 + max(after, *(0 if known is None else known.turn for known in keys)), secrets.token_bytes(32))
        self._put(1 if keep is not None and keys[0] == keep else 0, key)
        return key

    def drop_all_but(self, key: Key | None) -> None:
        """Overwrite every other key, and what is left of one."""
        for place, (known, at) in enumerate(zip(self._keys(), _PLACES, strict=True)):
            if (known is None or known != key) and any(self._read(at)):
                self._put(place, None)

    def drop_before(self, turn: int) -> None:
        """Overwrite the keys of earlier turns."""
        for place, known in enumerate(self._keys()):
            if known is not None and known.turn < turn:
                self._put(place, None)

    def _put(self, place: int, key: Key | None) -> None:
        record = bytes(_RECORD.size)
        if key is not None:
            record = _checked(_RECORD.pack(_MAGIC, key.turn, key.secret, bytes(16)))
        disk.write(self._handle, record, _PLACES[place])
        disk.sync(self._handle)

    def _read(self, at: int) -> bytes:
        os.lseek(self._handle, at, os.SEEK_SET)
        return os.read(self._handle, _RECORD.size)

    def _keys(self) -> list[Key | None]:
        return [_key_in(self._read(at)) for at in _PLACES]


def _open(file: Path, make: bool) -> tuple[int, bool]:
    """A handle, and whether the file can be changed by it."""
    while True:
        try:
            return disk.open_to_change(file), True
        except FileNotFoundError:
            if not make:
                raise
        except OSError:  # of somebody else, or a file system that can only be read
            if make:
                raise
            return os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)), False
        try:
            return disk.create(file), True
        except FileExistsError:  # somebody was quicker
            continue


def _checked(record: bytes) -> bytes:
    return record[:-16] + hashlib.sha256(record[:-16]).digest()[:16]


def _key_in(record: bytes) -> Key | None:
    if len(record) != _RECORD.size or record != _checked(record) or not record.startswith(_MAGIC):
        return None
    _, turn, secret, _ = _RECORD.unpack(record)
    return Key(turn, secret)
