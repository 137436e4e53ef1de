"""A disk on which a program is killed at any step, and what can be read from files by somebody who has kept every version of them."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import struct
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kveraser.files import disk

STEPS = [name for name, value in vars(disk).items() if callable(value) and value.__module__ == disk.__name__]


class KilledError(BaseException):
    """The end of the process: nothing that comes after it reaches the disk."""


class Killing:
    """Stands in for `kveraser.files.disk`, with a hard link to every file that was ever made.

    Attributes:
        kept: where the links are.
        count: steps so far.
    """

    def __init__(self, kept: Path) -> None:
        kept.mkdir(exist_ok=True)
        self.kept, self.count, self.at, self.dead = kept, 0, None, False
        self._real = {name: getattr(disk, name) for name in STEPS}

    @contextmanager
    def until(self, at: int | None = None):
        """A process that is killed before its step number `at`, or in the middle of it if it writes."""
        self.count, self.at, self.dead = 0, at, False
        try:
            yield
        except KilledError:
            pass
        finally:
            self.at, self.dead = None, False

    def keep(self, folder: Path) -> None:
        """Also keep links to the files in a folder that is there already."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self._link(file)

    def versions(self):
        """Every file that was ever made."""
        return sorted(self.kept.iterdir())

    def step(self, name, *args, **options):
        if self.dead or self.count == self.at:
            if name == "write" and not self.dead:
                handle, data, *at = args
                self._real["write"](handle, memoryview(data)[: len(data) // 2], *at)
            self.dead = True
            raise KilledError
        self.count += 1
        if name in ("sync", "sync_folder"):  # nothing here is about a machine that loses power
            return None
        result = self._real[name](*args, **options)
        if name == "create":
            self._link(args[0])
        return result

    def _link(self, file):
        os.link(file, self.kept / f"{len(list(self.kept.iterdir())):06}-{file.name.strip('.')}")


@contextmanager
def killing_disk(kept: Path, monkeypatch):
    """A `Killing` in place of the disk, for the time of the block."""
    found = Killing(kept)
    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(disk, name, lambda *args, name=name, **options: found.step(name, *args, **options))
        yield found


def readable_bytes(files) -> bytes:
    """All that can be read in files by somebody who has them all, decrypted with every key that is in any of them.

    Nothing is checked: also files that were cut or altered are decrypted as far as they go.
    """
    contents = [Path(file).read_bytes() for file in files]
    keys = [
        data[at : at + 32] for data in contents if len(data) < 5000 for at in (16, 4096 + 16) if any(data[at : at + 32])
    ]
    found = list(contents)
    for data in contents:
        line, end, body = data.partition(b"\n")
        try:
            head = json.loads(line)
            salt, lengths = head["salt"], head["parts"]
        except (ValueError, KeyError, TypeError):
            continue
        assert end
        for key in keys:
            own = hmac.new(key, b"kveraser sealed file" + salt.encode(), hashlib.sha256).digest()
            at = 0
            for part, length in enumerate(lengths):
                counter = struct.pack(">IQI", part, 0, 2)
                found.append(Cipher(algorithms.AES(own), modes.CTR(counter)).decryptor().update(body[at : at + length]))
                at += length + 16
    return b"\n".join(found)


def counted(most: int = 400):
    """0, 1, 2, ...: which step to be killed at; whoever takes them stops at the first that nobody reached."""
    return itertools.chain(range(most), iter(lambda: (_ for _ in ()).throw(AssertionError("it never ends")), None))
