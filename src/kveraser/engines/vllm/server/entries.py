"""What an entry of the store is: its geometry, the files that hold its states, and its manifest.

Knows: names and checksums of files, sizes. Does not know where entries are kept, or for how long.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from kveraser.engines.vllm.protocol import Piece
from kveraser.errors import StoreError
from kveraser.files import enclosed, opened

CHUNK = 256
"""Tokens per file."""
FORMAT = 2
"""Format 1 moved no keys of an edited context; it is still written where none are."""
_FILE = re.compile(r"(\d+)\.(\d+)-(\d+)\.(\d+)-(\d+)\.([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Geometry:
    """What states of a model look like, over all workers.

    Attributes:
        model: identifies the model and its configuration.
        dtype: of the states, as torch calls it ("float32").
    """

    model: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class StateFile:
    """One file: the states of a chunk in `layers` `[a, b)` and `heads` `[a, b)`."""

    name: str
    chunk: int
    layers: tuple[int, int]
    heads: tuple[int, int]

    @classmethod
    def parse(cls, name: str) -> StateFile | None:
        """From a file name; None for a file that is none of ours."""
        match = _FILE.fullmatch(name)
        if match is None:
            return None
        chunk, first, last, low, high = (int(part) for part in match.groups()[:5])
        return cls(name, chunk, (first, last), (low, high))

    @property
    def sha256(self) -> str:
        """The checksum that is part of the name."""
        return self.name.split(".")[-2]


@dataclass(frozen=True)
class Part:
    """Tokens `[start, end)` of a chunk, the files that hold the chunk, and the positions to move keys by when they are served."""

    start: int
    end: int
    files: tuple[str, ...]
    move: int = 0


@dataclass(frozen=True)
class Entry:
    """A sealed entry.

    Attributes:
        tokens: how many tokens' states it holds.
        parts: where they are.
        ids: for an edited context, the checksum of the token ids that stand for it (see `digest_ids`).
        salt: for an edited context, the secret that keeps its blocks apart in the engine's prefix cache.
        client: for whom it is kept; None for all who do not say who they are.
    """

    id: str
    geometry: Geometry
    tokens: int
    parts: tuple[Part, ...]
    ids: str | None = None
    salt: str | None = None
    client: str | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is served of it, one behind the other, with keys to be moved."""
        found: list[Piece] = []
        at = 0
        for part in self.parts:
            end = at + part.end - part.start
            if found and found[-1].move == part.move:
                found[-1] = replace(found[-1], end=end)
            else:
                found.append(Piece(self.id, at, end, part.move))
            at = end
        return tuple(found)


def to_manifest(entry: Entry) -> bytes:
    """What the file says of an entry, with a checksum."""
    moved = any(part.move for part in entry.parts)
    body = {
        "geometry": asdict(entry.geometry),
        "tokens": entry.tokens,
        "parts": [[part.start, part.end, list(part.files), *([part.move] if moved else [])] for part in entry.parts],
        "ids": entry.ids,
        "salt": entry.salt,
        "client": entry.client,
    }
    return enclosed(body, FORMAT if moved else 1)


def from_manifest(entry: str, text: str) -> Entry:
    """The entry that a file tells of.

    Raises:
        ValueError, KeyError, TypeError: it was altered, or is of a newer version.
    """
    body = opened(json.loads(text), FORMAT, "its manifest")
    return Entry(
        id=entry,
        geometry=Geometry(**body["geometry"]),
        tokens=body["tokens"],
        parts=tuple(Part(start, end, tuple(files), *move) for start, end, files, *move in body["parts"]),
        ids=body["ids"],
        salt=body["salt"],
        client=body.get("client"),
    )


def digest_ids(ids: Iterable[int]) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(b"".join(int(token).to_bytes(8, "little") for token in ids)).hexdigest()


def parts_of(entry: Entry, start: int, end: int) -> Iterator[Part]:
    """The parts of tokens `[start, end)`."""
    if not 0 <= start < end <= entry.tokens:
        raise StoreError(f"entry {entry.id} has {entry.tokens} tokens, [{start}, {end}) was asked for")
    at = 0
    for part in entry.parts:
        low, high = max(start, at), min(end, at + part.end - part.start)
        if low < high:
            yield replace(part, start=part.start + low - at, end=part.start + high - at)
        at += part.end - part.start
