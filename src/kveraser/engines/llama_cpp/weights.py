"""The fingerprint of a GGUF file: whether it is the backbone that an eraser was made for.

Knows: the layout of GGUF files, de-quantising a few rows. Does not know about llama.cpp or erasers.

`gguf`'s own reader makes an array of every token of the vocabulary, which takes seconds; here they are skipped.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from kveraser.errors import BackboneError
from kveraser.export.names import architecture
from kveraser.model.fingerprint import Fingerprint, sampled_places

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    """As in the file: the row length first."""
    kind: GGMLQuantizationType
    offset: int


class GgufWeights:
    """Metadata and single rows of a GGUF file.

    Raises:
        BackboneError: no GGUF file, or a damaged one.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, _Tensor] = {}
        try:
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(data)
        except (OSError, ValueError, struct.error, KeyError, IndexError) as error:
            raise BackboneError(f"{file} cannot be read as a GGUF file: {error!r}") from error

    def _read_header(self, data: mmap.mmap) -> None:
        if data[:4] != b"GGUF":
            raise BackboneError(f"{self.file} is no GGUF file")
        _, tensors, entries = struct.unpack_from("<IQQ", data, 4)
        self._at = 24
        for _ in range(entries):
            name = self._string(data)
            self.metadata[name] = self._value(data, self._scalar(data, "<I"))
        for _ in range(tensors):
            name = self._string(data)
            shape = tuple(self._scalar(data, "<Q") for _ in range(self._scalar(data, "<I")))
            kind = GGMLQuantizationType(self._scalar(data, "<I"))
            self._tensors[name] = _Tensor(shape, kind, self._scalar(data, "<Q"))
        alignment = int(self.metadata.get("general.alignment", 32))
        self._data = math.ceil(self._at / alignment) * alignment

    def _scalar(self, data: mmap.mmap, form: str) -> Any:
        (value,) = struct.unpack_from(form, data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self, data: mmap.mmap) -> str:
        length = self._scalar(data, "<Q")
        text = data[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", "replace")

    def _value(self, data: mmap.mmap, kind: int) -> Any:
        """A value; of an array only its length is kept."""
        if kind == _STRING:
            return self._string(data)
        if kind != _ARRAY:
            return self._scalar(data, _SCALARS[kind])
        sub, count = self._scalar(data, "<I"), self._scalar(data, "<Q")
        if sub == _STRING:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", data, self._at)
                self._at += 8 + length
        elif sub == _ARRAY:
            raise BackboneError(f"{self.file} holds arrays of arrays, which nobody writes")
        else:
            self._at += count * struct.calcsize(_SCALARS[sub])
        return count

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor."""
        return tensor in self._tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """`(rows, columns)` or `(values,)`.

        Raises:
            BackboneError: there is no such tensor.
        """
        if tensor not in self._tensors:
            raise BackboneError(f"{self.file} holds no tensor {tensor}")
        return tuple(reversed(self._tensors[tensor].shape))

    def values(self, tensor: str, places: list[int]) -> list[float]:
        """De-quantised values at places of the flattened tensor."""
        columns, entry = self.shape(tensor)[-1], self._tensors[tensor]
        block, size = GGML_QUANT_SIZES[entry.kind]
        row_bytes = columns // block * size
        found = []
        with self.file.open("rb") as stream:
            for place in places:
                row, column = divmod(place, columns)
                stream.seek(self._data + entry.offset + row * row_bytes)
                raw: NDArray[Any] = np.frombuffer(stream.read(row_bytes), np.uint8)
                if entry.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                    raw = raw.view(np.float32 if entry.kind == GGMLQuantizationType.F32 else np.float16)
                found.append(float(dequantize(raw, entry.kind)[column]))
        return found


def gguf_fingerprint(file: Path, model_type: str) -> Fingerprint:
    """The fingerprint of the model in a GGUF file, taken for a transformers `model_type`. One that has no norm where that has
    one (OLMo 2, say) has fewer weights in it, and so differs.

    Raises:
        BackboneError: not readable.
        EraserMismatchError: a `model_type` that has no GGUF form here.
    """
    weights, family = GgufWeights(file), architecture(model_type)
    name = str(weights.metadata.get("general.architecture"))

    def number(key: str) -> Any:
        return weights.metadata.get(f"{name}.{key}")

    shape = {
        "model_type": model_type if name == family.name else name,
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv") or number("attention.head_count"),
        "vocab_size": weights.shape("token_embd.weight")[0],
    }
    samples: list[float] = []
    for tensor in ("token_embd.weight", *([family.norm] if weights.has(family.norm) else [])):
        count = math.prod(weights.shape(tensor))
        samples += [round(value, 8) for value in weights.values(tensor, sampled_places(count).tolist())]
    return Fingerprint(shape, samples)
