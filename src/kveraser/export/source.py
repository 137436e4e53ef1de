"""An eraser's folder, read without its backbone.

Knows: PEFT's files and `kveraser.json`. Does not know about GGUF.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kveraser.eraser import EraserConfig
from kveraser.eraser.adapter_files import CONFIG, WEIGHTS
from kveraser.eraser.config import FILE_NAME
from kveraser.errors import EraserMismatchError
from kveraser.files import digest

_KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class EraserFiles:
    """What is in an eraser's folder.

    Attributes:
        folder: where it was read from.
        config: `kveraser.json`.
        lora_config: `adapter_config.json`.
        weights: LoRA A `(rank, in)` and B `(out, rank)` by module name.
        sha256: of the file with the weights.
    """

    folder: Path
    config: EraserConfig
    lora_config: dict[str, Any]
    weights: dict[str, tuple[Tensor, Tensor]]
    sha256: str

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> EraserFiles:
        """Read a folder written by `KVEraser.save_pretrained`.

        Raises:
            EraserMismatchError: no eraser, damaged, or no plain LoRA on the erased tokens.
        """
        place = Path(folder)
        config = EraserConfig.read(place / FILE_NAME)
        config.check_plain(place)
        try:
            lora_config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(str(place / WEIGHTS))
            if lora_config["peft_type"] != "LORA" or lora_config.get("use_dora") or lora_config.get("modules_to_save"):
                raise EraserMismatchError(f"the adapter in {place} is no plain LoRA ({lora_config['peft_type']})")
            weights = _pairs(tensors, place)
            return cls(place, config, lora_config, weights, digest(place / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, EraserMismatchError):
                raise
            raise EraserMismatchError(f"the eraser in {place} cannot be read, it may be damaged: {error!r}") from error

    def scaling(self, module: str) -> float:
        """What the product B A of a module is multiplied with."""
        alpha, rank = self._of(module, "lora_alpha", "alpha_pattern"), self._of(module, "r", "rank_pattern")
        return float(alpha / rank**0.5 if self.lora_config.get("use_rslora") else alpha / rank)

    def _of(self, module: str, name: str, pattern: str) -> float:
        """A setting, which PEFT may hold for some modules apart (by the end of their name, plain names only)."""
        for key, value in (self.lora_config.get(pattern) or {}).items():
            if module == key or module.endswith(f".{key}"):
                return float(value)
        return float(self.lora_config[name])


def _pairs(tensors: dict[str, Tensor], place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(_KEY_PREFIX).removesuffix(".weight").rpartition(".")
        parts.setdefault(module, {})[part] = tensor
    for module, found in parts.items():
        if set(found) != {"lora_A", "lora_B"}:
            raise EraserMismatchError(f"the adapter in {place} holds {sorted(found)} for {module}, not LoRA A and B")
        a, b = found["lora_A"], found["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise EraserMismatchError(f"{module} in {place}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit")
    if not parts:
        raise EraserMismatchError(f"the adapter in {place} holds no weights")
    return {module: (found["lora_A"], found["lora_B"]) for module, found in parts.items()}
