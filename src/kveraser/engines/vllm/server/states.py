"""The states of an entry in its files: what one worker writes of it, and what another one reads.

Knows: safetensors, checksums, layers and heads. Does not know which entries there are, or what they are for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kveraser.engines.vllm.server.entries import CHUNK, Entry, Part, StateFile
from kveraser.errors import StoreError
from kveraser.files import write_atomically


def write_states(folder: Path, first_layer: int, first_head: int, keys: Tensor, values: Tensor) -> None:
    """Write one worker's share, `(layers, tokens, kv_heads, head_dim)` each, a file for every chunk."""
    folder.mkdir(exist_ok=True, mode=0o700)
    layers, tokens, heads, _ = keys.shape
    for chunk, start in enumerate(range(0, tokens, CHUNK)):
        stop = min(start + CHUNK, tokens)
        data = save({"keys": keys[:, start:stop].contiguous(), "values": values[:, start:stop].contiguous()})
        place = f"{chunk}.{first_layer}-{first_layer + layers}.{first_head}-{first_head + heads}"
        write_atomically(folder / f"{place}.{hashlib.sha256(data).hexdigest()}.safetensors", data, private=True)


def read_states(
    folder: Path, entry: Entry, parts: Iterable[Part], layers: range, heads: range
) -> tuple[Tensor, Tensor]:
    """Keys and values `(layers, tokens, kv_heads, head_dim)` of some parts of an entry, on the CPU.

    Args:
        folder: the entry's own.

    Raises:
        StoreError: a file is missing or damaged.
    """
    found = [_read_part(folder, entry, part, layers, heads) for part in parts]
    return torch.cat([keys for keys, _ in found], 1), torch.cat([values for _, values in found], 1)


def _read_part(folder: Path, entry: Entry, part: Part, layers: range, heads: range) -> tuple[Tensor, Tensor]:
    shape = (len(layers), part.end - part.start, len(heads), entry.geometry.head_dim)
    dtype = getattr(torch, entry.geometry.dtype)
    states = {"keys": torch.empty(shape, dtype=dtype), "values": torch.empty(shape, dtype=dtype)}
    covered = 0
    for name in part.files:
        file = StateFile.parse(name)
        if file is None:
            raise StoreError(f"entry {entry.id} is damaged: {name!r} is no name of a file of states")
        rows = range(max(layers.start, file.layers[0]), min(layers.stop, file.layers[1]))
        columns = range(max(heads.start, file.heads[0]), min(heads.stop, file.heads[1]))
        if not rows or not columns:
            continue
        tensors = _load(folder, entry.id, file)
        for key, target in states.items():
            target[
                rows.start - layers.start : rows.stop - layers.start,
                :,
                columns.start - heads.start : columns.stop - heads.start,
            ] = tensors[key][
                rows.start - file.layers[0] : rows.stop - file.layers[0],
                part.start : part.end,
                columns.start - file.heads[0] : columns.stop - file.heads[0],
            ]
        covered += len(rows) * len(columns)
    if covered != len(layers) * len(heads):
        raise StoreError(f"entry {entry.id} is damaged: it lacks states of some layers or heads")
    return states["keys"], states["values"]


def _load(folder: Path, entry: str, file: StateFile) -> dict[str, Tensor]:
    try:
        data = (folder / file.name).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise StoreError(f"entry {entry} is damaged: the checksum of {file.name} does not match")
        return load(data)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"entry {entry} cannot be read: {error}") from error
