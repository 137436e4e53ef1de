"""Copies of cells, opened: where they are, and their keys and values as numbers.

Knows: the format in which llama.cpp gives a sequence's cells away and takes them back, quantised types, the order of a key's
dimensions. Does not know about sequences, or why anyone looks.

Keys and values come as transformers has them: keys rotated, at their own positions, with the dimensions of each half together.
llama.cpp keeps quantised ones multiplied with a Hadamard matrix, and keys of some architectures with the halves interleaved.

    magic, sequence, streams = 1, cells | position, 1, sequence (each cell) | transposed, layers | type, row, keys (each layer)
    | type, row, values (each layer); or, transposed: type, size, width, values
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

from kveraser.engines.llama_cpp.anatomy import Anatomy
from kveraser.errors import EngineError

States = NDArray[np.uint8]
SMALLEST_HADAMARD = 64
_HEADER, _CELL = 16, 12
_OTHER = "llama.cpp's copy of cells is not in the format of this version"
_FLOATS: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
}


def hadamard_form(head: int) -> bool:
    """Whether llama.cpp keeps quantised keys of heads of so many dimensions in Hadamard form."""
    return head % SMALLEST_HADAMARD == 0 and not int(os.environ.get("LLAMA_ATTN_ROT_DISABLE") or 0)


class Packed:
    """Cells in llama.cpp's own format; what is changed here is changed in `states`.

    Args:
        states: as llama.cpp gives them.
        anatomy: of the model.

    Raises:
        EngineError: another format than this version's.
    """

    def __init__(self, states: States, anatomy: Anatomy) -> None:
        self.states, self.anatomy = states, anatomy
        streams, count = (int(value) for value in states[8:_HEADER].view(np.uint32))
        end = _HEADER + _CELL * count
        self.positions = states[_HEADER:end].view(np.int32)[::3]
        """`(cells,)`, in the order of the cells; can be written to."""
        self._keys: list[tuple[GGMLQuantizationType, States]] = []
        self._values: list[tuple[GGMLQuantizationType, States, bool]] = []
        if not count:
            return
        transposed, layers = (int(value) for value in states[end : end + 8].view(np.uint32))
        if streams != 1 or transposed > 1 or layers != anatomy.layers:
            raise EngineError(_OTHER)
        self._at = end + 8
        for _ in range(layers):
            kind, row = self._number(np.int32), self._number(np.uint64)
            self._keys.append((GGMLQuantizationType(kind), self._bytes(count, row)))
        for _ in range(layers):
            kind = self._number(np.int32)
            if transposed:
                size, width = self._number(np.uint32), self._number(np.uint32)
                self._values.append((GGMLQuantizationType(kind), self._bytes(width, size * count), True))
            else:
                self._values.append((GGMLQuantizationType(kind), self._bytes(count, self._number(np.uint64)), False))
        if self._at != len(states):
            raise EngineError(_OTHER)

    def _number(self, kind: Any) -> int:
        size = np.dtype(kind).itemsize
        found = int(self.states[self._at : self._at + size].copy().view(kind)[0])
        self._at += size
        return found

    def _bytes(self, rows: int, row: int) -> States:
        end = self._at + rows * row
        if end > len(self.states):
            raise EngineError(_OTHER)
        found = self.states[self._at : end].reshape(rows, row)
        self._at = end
        return found

    def __len__(self) -> int:
        return len(self.positions)

    def keys(self, layer: int) -> Tensor:
        """`(cells, kv_heads, head_dim)` float32."""
        kind, rows = self._keys[layer]
        found = self._numbers(kind, rows)
        if kind not in _FLOATS and hadamard_form(self.anatomy.head):
            found = _hadamard(found, _widest(self.anatomy.head))
        return self.anatomy.halves(found)

    def values(self, layer: int) -> Tensor:
        """`(cells, kv_heads, head_dim)` float32."""
        kind, rows, transposed = self._values[layer]
        if transposed:
            plain = np.ascontiguousarray(rows.view(_FLOATS[kind]).T).astype(np.float32, copy=False)
            return torch.from_numpy(plain).view(len(self), -1, self.anatomy.head)
        found = self._numbers(kind, rows)
        quantised = kind not in _FLOATS and hadamard_form(self.anatomy.head)
        return _hadamard(found, SMALLEST_HADAMARD) if quantised else found

    def turn(self, delta: int) -> None:
        """Move the cells by so many positions, keys and all; these are rounded again."""
        turns = self.anatomy.turning.at(torch.tensor([delta]))
        self.positions += delta
        for layer, (kind, rows) in enumerate(self._keys):
            keys = self.anatomy.interleave(turns.to_place(self.keys(layer).transpose(0, 1), layer).transpose(0, 1))
            if kind in _FLOATS:
                rows.view(_FLOATS[kind])[:] = keys.reshape(len(self), -1).numpy()
                continue
            if hadamard_form(self.anatomy.head):
                keys = _hadamard(keys, _widest(self.anatomy.head))
            rows[:] = quantize(np.ascontiguousarray(keys.reshape(len(self), -1).numpy()), kind)

    def _numbers(self, kind: GGMLQuantizationType, rows: States) -> Tensor:
        numbers = rows.view(_FLOATS[kind]).astype(np.float32) if kind in _FLOATS else dequantize(rows, kind)
        return torch.from_numpy(np.ascontiguousarray(numbers)).view(len(self), -1, self.anatomy.head)


class Layers(Mapping[int, Any]):
    """The layers of copied cells as the scan wants them: each is opened when it is asked for.

    Args:
        packed: the cells.
        length: slots; those without a cell are zero.
    """

    def __init__(self, packed: Packed, length: int) -> None:
        self._packed, self._length, self._opened = packed, length, dict[int, Layer]()

    def __getitem__(self, layer: int) -> Layer:
        if layer not in self._opened:
            self._opened[layer] = Layer(self._packed, layer, self._length)
        return self._opened[layer]

    def __iter__(self) -> Any:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self._packed.anatomy.layers


class Layer:
    """Keys and values of one layer, `(1, kv_heads, slots, head_dim)` float32, opened when they are asked for."""

    def __init__(self, packed: Packed, layer: int, length: int) -> None:
        self._packed, self._layer, self._length = packed, layer, length
        self._known: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor:
        """Rotated, at their own positions."""
        return self._of("keys")

    @property
    def values(self) -> Tensor:
        """As they are."""
        return self._of("values")

    def _of(self, part: str) -> Tensor:
        if part not in self._known:
            found = getattr(self._packed, part)(self._layer)
            states = torch.zeros(1, found.shape[1], self._length, found.shape[2])
            states[0, :, torch.from_numpy(self._packed.positions.astype(np.int64))] = found.transpose(0, 1)
            self._known[part] = states
        return self._known[part]


def _widest(head: int) -> int:
    """The size of the Hadamard matrix for keys: the largest power of two, from 64 on, that divides the head."""
    size = SMALLEST_HADAMARD
    while head % (2 * size) == 0:
        size *= 2
    return size


def _hadamard(states: Tensor, size: int) -> Tensor:
    """Multiplied, `size` dimensions at a time; twice is nothing."""
    found: Tensor = states.unflatten(-1, (-1, size)) @ _matrix(size)
    return found.flatten(-2)


@lru_cache
def _matrix(size: int) -> Tensor:
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.mul(size**-0.5)
