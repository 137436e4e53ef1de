"""The eraser as a plain PEFT folder, for programs that load LoRA adapters.

Knows: PEFT's files. Does not know who loads them.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

from kveraser.eraser.adapter_files import CONFIG, WEIGHTS
from kveraser.errors import EraserMismatchError, OptionError
from kveraser.export.source import EraserFiles
from kveraser.files import digest, write_atomically

# What every version of PEFT, and whoever reads its files, understands; newer fields only where they say something.
_PLAIN = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
          "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip


def write_peft_folder(source: str | PathLike[str], folder: str | PathLike[str]) -> EraserFiles:
    """Write `adapter_config.json` and, byte for byte, `adapter_model.safetensors`; read back by PEFT and compared.

    `kveraser.json` goes with them, so that the folder stays an eraser; nobody else looks at it.

    Args:
        source: folder made by `KVEraser.save_pretrained`.
        folder: to be written; files of the same name there are replaced.

    Raises:
        EraserMismatchError: no eraser, or what was written does not read back.
        OptionError: `folder` is a file.
    """
    files, target = EraserFiles.read(source), Path(folder)
    if target.exists() and not target.is_dir():
        raise OptionError(f"{target} is a file; give the name of a folder")
    target.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in files.lora_config.items() if key in _PLAIN or value not in (None, False, {})}
    said["inference_mode"] = True
    data = (files.folder / WEIGHTS).read_bytes()
    files.config.write(target)
    write_atomically(target / CONFIG, (json.dumps(said, indent=2, sort_keys=True) + "\n").encode())
    write_atomically(target / WEIGHTS, data)
    _compare(files, target)
    return EraserFiles.read(target)


def _compare(files: EraserFiles, folder: Path) -> None:
    config = PeftConfig.from_pretrained(str(folder))
    wanted = files.lora_config
    if (
        not isinstance(config, LoraConfig)
        or (config.r, config.lora_alpha) != (wanted["r"], wanted["lora_alpha"])
        or sorted(config.target_modules or []) != sorted(wanted["target_modules"] or [])
        or digest(folder / WEIGHTS) != files.sha256
        or len(load_file(str(folder / WEIGHTS))) != 2 * len(files.weights)
    ):
        raise EraserMismatchError(f"{folder} does not read back as the eraser of {files.folder}; is the disk full?")
