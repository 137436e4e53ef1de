"""How GGUF files name, and order, what transformers' models hold.

Knows: architectures, tensor names, the row order of queries and keys. Does not know about files or erasers.

transformers' Llama rotates the first half of a head's dimensions against the second half, GGUF's llama rotates neighbors;
the conversion therefore interleaves the two halves of every head's rows in the query and key projections. What is
added to these projections, LoRA's B, has to be interleaved alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map
from numpy.typing import NDArray

from kveraser.errors import EraserMismatchError


@dataclass(frozen=True)
class Architecture:
    """How one family of models is written as GGUF.

    Attributes:
        name: GGUF's name for it.
        arch: the same, as `gguf`'s number.
        interleaved: whether the rows of query and key projections are interleaved.
        norm: the norm whose weights a fingerprint samples.
    """

    name: str
    arch: Any
    interleaved: bool
    norm: str


_FAMILIES = {
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, True, "blk.0.attn_norm.weight"),
    "mistral": Architecture("llama", MODEL_ARCH.LLAMA, True, "blk.0.attn_norm.weight"),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, False, "blk.0.attn_norm.weight"),
    "qwen3": Architecture("qwen3", MODEL_ARCH.QWEN3, False, "blk.0.attn_q_norm.weight"),
}


def architecture(model_type: str) -> Architecture:
    """The GGUF form of a transformers `model_type`.

    Raises:
        EraserMismatchError: a family whose GGUF form is not known here.
    """
    if model_type not in _FAMILIES:
        raise EraserMismatchError(
            f"erasers of {model_type!r} models cannot be written as GGUF; there are: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]


class Naming:
    """Names and row orders for one backbone.

    Args:
        shape: the `shape` of its fingerprint.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        self.architecture = architecture(str(shape["model_type"]))
        self._names = get_tensor_name_map(self.architecture.arch, int(shape["num_hidden_layers"]))
        heads = int(shape["num_attention_heads"])
        self._heads = {"q_proj": heads, "k_proj": int(shape["num_key_value_heads"] or heads)}

    def tensor(self, module: str) -> str:
        """The tensor of a module such as `model.layers.3.self_attn.q_proj`.

        Raises:
            EraserMismatchError: the architecture has no such module.
        """
        name = self._names.get_name(module)
        if name is None:
            raise EraserMismatchError(f"{module} has no tensor in GGUF files of {self.architecture.name} models")
        return f"{name}.weight"

    def rows(self, module: str, matrix: NDArray[Any]) -> NDArray[Any]:
        """The rows of a module's weight, or of LoRA's B `(out, rank)`, in GGUF's order."""
        heads = self._heads.get(module.rsplit(".", 1)[-1])
        if heads is None or not self.architecture.interleaved:
            return matrix
        halves = matrix.reshape(heads, 2, -1, *matrix.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))

    def rows_back(self, module: str, matrix: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `rows`."""
        heads = self._heads.get(module.rsplit(".", 1)[-1])
        if heads is None or not self.architecture.interleaved:
            return matrix
        pairs = matrix.reshape(heads, -1, 2, *matrix.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(matrix.shape))
