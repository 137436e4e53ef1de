"""Tensors on disk that are computed once: pieces with checksums, in a folder that does not grow beyond a limit.

Knows: safetensors, files, bytes. Does not know what the tensors are (`store.py`).

    store.json               what all pieces depend on
    pieces.txt               the names of the pieces that were written
    NAME.safetensors         a piece, there whole or not at all; read by mapping it into memory

A process that is killed at any moment leaves a piece whole, or a partial file that nothing reads and that is removed later.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kveraser.errors import TrainingError
from kveraser.files import write_atomically
from kveraser.files.writing import meant_by
from kveraser.training.checkpoint import difference

FORMAT = 2
_ABOUT, _NAMES = "store.json", "pieces.txt"
_ABANDONED = 3600.0
"""Seconds after which nobody is writing a partial file any more."""
_RECOUNT = 0.01
"""Share of the limit after whose writing the folder is counted again: other processes may write, too."""


class Pieces:
    """The pieces of a folder.

    Args:
        about: what all of them depend on, as JSON holds it; a folder with pieces of anything else is refused.
        limit: bytes that `root` may have in all.
        root: the folder, or one above it that others share.

    Raises:
        TrainingError: the folder is of something else, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], limit: int, root: Path | None = None) -> None:
        self.folder, self.limit, self.root = folder, limit, root or folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._introduce({"format": FORMAT, **about})
            _remove_abandoned(folder)
            names = folder / _NAMES
            self._written = set(names.read_text(encoding="utf-8").split() if names.exists() else ())
        except OSError as error:
            raise self._unwritable(error) from error
        except UnicodeDecodeError as error:
            raise TrainingError(f"{names} cannot be read; {self._remedy}") from error
        self._counted = self._since = 0

    def get(self, name: str, of: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a piece, made and written if it is not there; on the CPU, mapped from the file.

        Args:
            of: tells what it was made of.

        Raises:
            TrainingError: it was written and is gone, is altered, was made of something else, or has no room.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            if name in self._written:
                raise TrainingError(f"{file} is missing, which was written before; {self._remedy}")
            self._write(file, of, make())
        return self._read(file, of)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more are within the limit. Counting looks at every file, so it is not done each time."""
        if not self._counted or self._since > _RECOUNT * self.limit or self._counted + self._since + size > self.limit:
            self._counted, self._since = self.used, 0
        return self._counted + size <= self.limit

    @property
    def used(self) -> int:
        """Bytes of all that is in the root folder."""
        return _bytes_in(self.root)

    def check_room(self, wanted: int, what: str) -> None:
        """Raise `TrainingError` unless this folder may come to so many bytes, and the disk has them."""
        own, free = _bytes_in(self.folder), shutil.disk_usage(self.folder).free
        more = max(wanted - own, 0)
        need = f"{what} needs about {_words(wanted)} in {self.folder}"
        advice = "train on fewer or shorter contexts (more epochs, say)"
        if self.used + more > self.limit:
            beside = f", beside {_words(self.used - own)} of others" if self.used > own else ""
            raise TrainingError(
                f"{need}{beside}; at most {_words(self.limit)} are allowed. Raise --store-limit, or {advice}"
            )
        if more > free:
            raise TrainingError(f"{need}, of which {_words(more)} are still to be written; the disk has {_words(free)}. "
                                f"Give --store on another disk, or {advice}")  # fmt: skip

    def _introduce(self, about: dict[str, Any]) -> None:
        """Say what the pieces depend on, or check that they do."""
        file = self.folder / _ABOUT
        if not file.exists():
            write_atomically(file, json.dumps(about, indent=2).encode())
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            assert isinstance(known, dict)
        except (ValueError, AssertionError) as error:
            raise TrainingError(f"{file} cannot be read; {self._remedy}") from error
        found = difference(known, json.loads(json.dumps(about)))
        if found is not None:
            raise TrainingError(
                f"the lessons in {self.folder} are of another run: {found}. Give another --store, or delete it"
            )

    def _write(self, file: Path, of: str, tensors: dict[str, Tensor]) -> None:
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = save(kept, {"of": of, "sha256": _checksum(of, kept)})
        if not self._has_room(len(data)):
            raise TrainingError(
                f"{self.root} would have more than its {_words(self.limit)} with {file.name}; raise --store-limit, "
                "and the same command goes on"
            )
        try:
            write_atomically(file, data)
            with (self.folder / _NAMES).open("a", encoding="utf-8") as names:
                names.write(f"{file.stem}\n")
        except OSError as error:
            raise self._unwritable(error) from error
        self._written.add(file.stem)
        self._since += len(data)

    def _read(self, file: Path, of: str) -> dict[str, Tensor]:
        try:
            with safe_open(str(file), "pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise TrainingError(f"{file} is altered or cut off ({error}); {self._remedy}") from error
        if metadata.get("sha256") != _checksum(metadata.get("of", ""), tensors):
            raise TrainingError(f"{file} is altered: its checksum does not fit; {self._remedy}")
        if metadata["of"] != of:
            raise TrainingError(
                f"{file} was made of another lesson: the text, the tokenizer, a task or the backbone has changed since. Give another "
                f"--store, or delete {self.folder}"
            )
        return tensors

    @property
    def _remedy(self) -> str:
        return f"delete the folder {self.folder}, and the same command computes it again"

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot keep lessons in {self.folder}: {error}. Make room, or give --store on another disk; the same command goes on"
        )


def _remove_abandoned(folder: Path) -> None:
    """Remove the partial files of processes that were killed; those of others that are writing now come and go meanwhile."""
    for left in folder.glob(".*"):
        with suppress(FileNotFoundError):
            if _is_ours(meant_by(left.name)) and left.is_file() and time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def _is_ours(name: str | None) -> bool:
    """Whether a file of that name is one that is written here, or beside the pieces."""
    return name is not None and (name == _ABOUT or name.endswith(".safetensors"))


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # another process has just given it its name
            continue
    return total


def _words(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _checksum(of: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(of.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
