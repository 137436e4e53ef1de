"""A folder of keys and values that an engine's processes share: saved states, and edited contexts made of them.

Knows: files, checksums, sizes. Does not know about vLLM, requests or tokens' meaning.

    <folder>/<id>/manifest.json      what the entry is; written last, with a checksum of its own
    <folder>/<id>/<file>             safetensors "keys" and "values" (layers, tokens, kv_heads, head_dim), named after
                                     chunk, layers, heads and the SHA-256 of the file

A worker writes its layers and heads of each chunk of tokens into a pending folder; sealing checks that the files cover
everything and renames the folder. So an entry is there whole or not at all, and it can be read with another split into
workers than it was written with. An edited context shares its files with the entries it is made of by hard links (copies
where the file system has none), so that every entry stands on its own and the file system counts the references.

The folder is bounded: making room drops entries of the client that takes the most, those used longest ago first, so nobody
loses one while somebody else takes more. Whatever is missing or altered is an error, never a guess.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kveraser.engines.vllm.protocol import Piece, checked_id, is_id
from kveraser.engines.vllm.server.entries import (
    CHUNK,
    Entry,
    Geometry,
    Part,
    StateFile,
    from_manifest,
    parts_of,
    to_manifest,
)
from kveraser.engines.vllm.server.states import read_states, write_states
from kveraser.errors import StoreError
from kveraser.files import write_atomically

_MANIFEST = "manifest.json"
_STALE_SECONDS = 3600.0


class EditStore:
    """The entries in a folder.

    Args:
        folder: shared by all processes of the engine (on several machines: a shared file system).
        capacity: bytes that the files may take in all.
        geometry: of the states of this engine's model; entries of others are refused.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, capacity: int, geometry: Geometry) -> None:
        self.folder, self.capacity, self.geometry = Path(folder), capacity, geometry
        if capacity <= 0:
            raise StoreError(f"the store's capacity must be more than 0 bytes, got {capacity}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(f"{self.folder} is not writable")
        except OSError as error:
            raise StoreError(f"the store {self.folder} cannot be used: {error}") from error

    # -- writing (workers) ---------------------------------------------------------------------------------------

    def write(self, entry: str, first_layer: int, first_head: int, keys: Tensor, values: Tensor) -> None:
        """Write one worker's share of a new entry, `(layers, tokens, kv_heads, head_dim)` each."""
        write_states(self._pending(entry), first_layer, first_head, keys, values)

    # -- entries (scheduler) -------------------------------------------------------------------------------------

    @staticmethod
    def new_id() -> str:
        """An id that nobody can guess."""
        return secrets.token_hex(16)

    def seal(self, entry: str, tokens: int, client: str | None = None) -> Entry:
        """Make what the workers wrote an entry.

        Raises:
            StoreError: files are missing. The entry is then gone.
        """
        folder = self._pending(entry)
        try:
            files = [file for name in _names(folder) if (file := StateFile.parse(name))]
            parts = []
            for chunk, start in enumerate(range(0, tokens, CHUNK)):
                mine = [file for file in files if file.chunk == chunk]
                covered = sum((f.layers[1] - f.layers[0]) * (f.heads[1] - f.heads[0]) for f in mine)
                if covered != self.geometry.layers * self.geometry.kv_heads:
                    raise StoreError(
                        f"the states of tokens from {start} on were not written by all workers: {covered} of "
                        f"{self.geometry.layers * self.geometry.kv_heads} layers x heads are there"
                    )
                parts.append(Part(0, min(CHUNK, tokens - start), tuple(sorted(file.name for file in mine))))
            return self._finish(folder, Entry(entry, self.geometry, tokens, tuple(parts), client=client))
        except (OSError, StoreError) as error:
            self.discard(entry)
            raise error if isinstance(error, StoreError) else StoreError(f"entry {entry}: {error}") from error

    def compose(self, pieces: Sequence[Piece], ids: str, client: str | None = None) -> Entry:
        """Make an edited context of pieces of other entries; it keeps working when those are dropped.

        Args:
            pieces: one behind the other, from position 0; their keys are kept as they are, and moved when they are served. How an
                edited context among them moved its own does not matter.
            ids: `digest_ids` of the token ids that stand for it.

        Raises:
            StoreError: an entry is missing or too short.
        """
        parts: list[Part] = []
        new = self.new_id()
        folder = self._pending(new)
        folder.mkdir(mode=0o700)
        try:
            for piece in pieces:
                source = self.entry(piece.entry)
                for part in parts_of(source, piece.start, piece.end):
                    for name in part.files:
                        _share(self.folder / piece.entry / name, folder / name)
                    parts.append(replace(part, move=piece.move))
            tokens = sum(len(piece) for piece in pieces)
            made = Entry(new, self.geometry, tokens, tuple(parts), ids, secrets.token_hex(16), client)
            return self._finish(folder, made)
        except OSError as error:
            raise StoreError(f"an edited context cannot be written: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def entry(self, entry: str) -> Entry:
        """The entry with that id; counts as a use of it.

        Raises:
            StoreError: missing, damaged, or of another model.
        """
        file = self.folder / checked_id(entry) / _MANIFEST
        try:
            found = from_manifest(entry, file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no entry {entry} in the store; it was dropped to make room, or never was: erase again"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"entry {entry} is damaged: {error}") from error
        if found.geometry != self.geometry:
            raise StoreError(f"entry {entry} is of another model: {found.geometry}, this engine has {self.geometry}")
        with suppress(OSError):  # it was dropped meanwhile: reading it will say so
            os.utime(file)
        return found

    def drop(self, entry: str) -> None:
        """Forget an entry; one that is not there is no error."""
        folder = self.folder / checked_id(entry)
        gone = self.folder / f".{secrets.token_hex(8)}.gone"
        try:
            os.replace(folder, gone)
        except OSError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def discard(self, entry: str) -> None:
        """Remove what was written of an entry that will not be sealed."""
        shutil.rmtree(self._pending(entry), ignore_errors=True)

    def make_room(self, size: int, keep: Iterable[str] = (), client: str | None = None) -> None:
        """Drop entries of the client that takes the most, but not those in `keep`, until `size` more bytes of a client fit.

        Raises:
            StoreError: they never will.
        """
        kept = set(keep)
        if size > self.capacity:
            raise StoreError(
                f"the states take {size:,} bytes, the store holds {self.capacity:,}; give it more with capacity_gb"
            )
        clients = {entry: self._client_of(entry) for entry in self.ids()}
        oldest = sorted((entry for entry in clients if entry not in kept), key=self._last_use)
        while self.size() + size > self.capacity:
            if not oldest:
                raise StoreError(
                    f"no room for {size:,} bytes beside the {self.size():,} in use, the store holds {self.capacity:,}; "
                    "give it more with capacity_gb"
                )
            taken = {who: size if who == client else 0 for who in {clients[entry] for entry in oldest}}
            for who in taken:
                taken[who] += self._size(entry for entry, owner in clients.items() if owner == who)
            last = next(entry for entry in oldest if taken[clients[entry]] == max(taken.values()))
            self.drop(last)
            oldest.remove(last)
            del clients[last]

    def ids(self) -> list[str]:
        """Ids of all entries."""
        return [name for name in _names(self.folder) if is_id(name)]

    def size(self) -> int:
        """Bytes that the files take; shared ones count once."""
        return self._size(_names(self.folder))

    def _size(self, entries: Iterable[str]) -> int:
        seen: dict[tuple[int, int], int] = {}
        for entry in entries:
            for root, _, files in os.walk(self.folder / entry):
                for name in files:
                    with suppress(OSError):  # dropped meanwhile
                        info = os.stat(os.path.join(root, name))
                        seen[info.st_dev, info.st_ino] = info.st_size
        return sum(seen.values())

    def _client_of(self, entry: str) -> str | None:
        try:
            return from_manifest(entry, (self.folder / entry / _MANIFEST).read_text(encoding="utf-8")).client
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clean(self) -> None:
        """Remove what processes that died have left half-written."""
        for name in _names(self.folder):
            folder = self.folder / name
            try:
                if name.startswith(".") and time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue

    # -- reading (workers) ---------------------------------------------------------------------------------------

    def read(self, entry: Entry, start: int, end: int, layers: range, heads: range) -> tuple[Tensor, Tensor]:
        """Keys and values `(layers, tokens, kv_heads, head_dim)` of tokens `[start, end)`, on the CPU.

        Raises:
            StoreError: a file is missing or damaged.
        """
        return read_states(self.folder / entry.id, entry, parts_of(entry, start, end), layers, heads)

    # -- files ---------------------------------------------------------------------------------------------------

    def _pending(self, entry: str) -> Path:
        return self.folder / f".{checked_id(entry)}.pending"

    def _last_use(self, entry: str) -> float:
        try:
            return (self.folder / entry / _MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    def _finish(self, folder: Path, entry: Entry) -> Entry:
        write_atomically(folder / _MANIFEST, to_manifest(entry), private=True)
        os.replace(folder, self.folder / entry.id)
        return entry


def _share(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
