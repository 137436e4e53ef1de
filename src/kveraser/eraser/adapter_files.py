"""PEFT's adapter files: where they are, and what is in them for a model.

Knows: folders, the hub, PEFT's names of files and tensors. Does not know what an eraser does with its weights.

An adapter may have been saved for the causal model or for the body below its head (`AutoModel`); its tensors' names then
lack one level. Both are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from kveraser.eraser.config import FILE_NAME
from kveraser.errors import EraserMismatchError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."


def find_folder(path: str) -> Path:
    """The local folder of a path or hub id.

    Raises:
        EraserMismatchError: neither a folder with an adapter nor a hub id that can be reached.
    """
    folder = Path(path).expanduser()
    if (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise EraserMismatchError(
            f"{path} holds neither a {FILE_NAME} nor an {CONFIG}, so it is not an eraser; give a folder or hub id of one"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise EraserMismatchError(
            f"{path} is neither a folder with a {FILE_NAME} nor a reachable hub id: {error}"
        ) from error


def read_lora_config(folder: Path, source: str) -> LoraConfig:
    """What PEFT says of an adapter; `source` is for messages.

    Raises:
        EraserMismatchError: unreadable, or no plain LoRA.
    """
    try:
        found = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT and JSON raise their own kinds
        raise EraserMismatchError(f"the adapter in {source} cannot be read, it may be damaged: {error}") from error
    if not isinstance(found, LoraConfig) or found.use_dora or found.modules_to_save:
        raise EraserMismatchError(f"the adapter in {source} is no plain LoRA ({found.peft_type}); export it as one")
    return found


def read_weights(folder: Path, wanted: Collection[str], body: str) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names they have below the causal model.

    Args:
        wanted: these names, of all tensors.
        body: what the causal model calls the model below its head, such as `model`.

    Raises:
        EraserMismatchError: unreadable.
    """
    try:
        weights = load_file(str(folder / WEIGHTS))
    except Exception as error:  # safetensors raises its own kinds
        raise EraserMismatchError(f"the adapter in {folder} cannot be read, it may be damaged: {error}") from error
    level = f"{KEY_PREFIX}{body}."
    shorter = {f"{KEY_PREFIX}{name.removeprefix(level)}": name for name in wanted if name.startswith(level)}
    if weights.keys() <= shorter.keys() - set(wanted):
        return {shorter[name]: tensor for name, tensor in weights.items()}
    return weights


def tidy(file: Path) -> None:
    """Sort PEFT's target modules (a set), so that the same eraser always gives the same file."""
    data = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(data.get("target_modules"), list):
        data["target_modules"] = sorted(data["target_modules"])
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
