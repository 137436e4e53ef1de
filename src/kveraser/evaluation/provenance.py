"""Where numbers come from: versions, machine, commit, eraser, files.

Knows: the installation. Does not know what is evaluated.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kveraser import __version__
from kveraser.eraser import KVEraser
from kveraser.model.view import model_device, model_dtype

_PACKAGES = ("torch", "transformers", "peft")


def environment(model: nn.Module) -> dict[str, Any]:
    """Versions, threads, and what the model runs on."""
    device = model_device(model)
    return {
        "kveraser": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def placement(model: nn.Module) -> dict[str, str]:
    """Device and type of a model."""
    return {"device": str(model_device(model)), "dtype": str(model_dtype(model)).removeprefix("torch.")}


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, `-dirty` where the package differs from it; None when
    it runs from elsewhere."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def eraser_facts(eraser: KVEraser | None) -> dict[str, Any] | None:
    """How an eraser attends, how it was trained, and a digest of its weights (rounded to bfloat16, so that the type in
    which they are held does not count)."""
    if eraser is None:
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(eraser.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.bfloat16().view(torch.int16).numpy().tobytes())
    return {
        "kind": eraser.kind,
        "rank": eraser.lora_config.r if eraser.lora_config else None,
        "window": eraser.window,
        "repair": eraser.repair,
        "choose": eraser.choose,
        "sha256": digest.hexdigest(),
        "notes": eraser.config.notes,
    }


def text_digest(parts: list[str]) -> str:
    """A digest of texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
