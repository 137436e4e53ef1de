"""What has to be known of a GGUF model to read its states as transformers would have them.

Knows: the metadata and small tensors of the file, the order of dimensions, rotary frequencies, query norms. Does not know about
cells, or what the states are read for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kveraser.engines.llama_cpp.weights import GgufWeights, gguf_fingerprint
from kveraser.errors import CalibrationError, EraserMismatchError
from kveraser.export.names import architecture
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import Turning


@dataclass(frozen=True)
class Norm:
    """Root-mean-square normalisation of each head's query."""

    weight: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        found: Tensor = states * (states.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight
        return found


class Anatomy:
    """Of the model in a GGUF file.

    Args:
        file: the file.
        layers, heads, head: how many there are, and dimensions of a head.
    """

    def __init__(self, file: Path, layers: int, heads: int, head: int) -> None:
        self.file, self.layers, self.heads, self.head = file, layers, heads, head

    @cached_property
    def _weights(self) -> GgufWeights:
        return GgufWeights(self.file)

    @cached_property
    def name(self) -> str:
        """GGUF's name of the architecture."""
        return str(self._weights.metadata.get("general.architecture"))

    @cached_property
    def _interleaved(self) -> bool:
        try:
            return architecture(self.name).interleaved
        except EraserMismatchError:
            raise CalibrationError(
                f"how {self.name} models order their keys is not known here, so their states cannot be read"
            ) from None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the model.

        Raises:
            CalibrationError: an architecture that is not known here.
        """
        assert self._interleaved is not None
        return gguf_fingerprint(self.file, self.name)

    @cached_property
    def turning(self) -> Turning:
        """How keys are rotated, their halves together.

        Raises:
            CalibrationError: scaled in a way that is not known here.
        """
        size = int(self._number("rope.dimension_count", self.head))
        scaling = str(self._number("rope.scaling.type", "none"))
        if scaling not in ("none", "linear") or (self._interleaved and size != self.head):
            raise CalibrationError(f"keys of {self.file.name} are rotated in a way that is not known here ({scaling})")
        base = float(self._number("rope.freq_base", 10000.0))
        frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        if scaling == "linear":
            frequencies = frequencies / float(self._number("rope.scaling.factor", 1.0))
        if self._weights.has("rope_freqs.weight"):
            frequencies = frequencies / torch.tensor(self._weights.values("rope_freqs.weight", list(range(size // 2))))
        return Turning((True,) * self.layers, "halves", frequencies.float())

    def norm(self, layer: int) -> tuple[Norm | None, tuple[int, ...]]:
        """The query norm of a layer, and the shape of what goes into it for one token."""
        tensor = f"blk.{layer}.attn_q_norm.weight"
        if not self._weights.has(tensor):
            return None, ()
        weight = torch.tensor(self._weights.values(tensor, list(range(self.head))))
        return Norm(weight, float(self._number("attention.layer_norm_rms_epsilon", 1e-6))), (self.heads, self.head)

    def _number(self, key: str, otherwise: Any) -> Any:
        found = self._weights.metadata.get(f"{self.name}.{key}")
        return otherwise if found is None else found

    def halves(self, states: Tensor) -> Tensor:
        """Queries or keys `(..., head_dim)` with the dimensions of each half together."""
        return torch.cat([states[..., 0::2], states[..., 1::2]], -1) if self._interleaved else states

    def interleave(self, states: Tensor) -> Tensor:
        """The inverse of `halves`."""
        return torch.stack(states.chunk(2, -1), -1).flatten(-2) if self._interleaved else states
