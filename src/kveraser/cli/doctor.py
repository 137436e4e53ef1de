"""`kveraser doctor`: versions, device, threads, caches, and what is supported for a model."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kveraser import __version__
from kveraser.backbone import (
    DEFAULT_BACKBONE,
    check_converted,
    converted_folder,
    default_dtype,
    digest,
    embedded_gguf,
    load_backbone,
)
from kveraser.cache import check_model
from kveraser.cli.common import JsonOption, print_json, reported, stderr, stdout
from kveraser.eraser import shipped_eraser, shipped_erasers
from kveraser.errors import BackboneError, EraserMismatchError, UnsupportedCacheError
from kveraser.methods import methods
from kveraser.paths import cache_folder
from kveraser.rope import rotary_layout

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "gguf")


def _embedded_state() -> str:
    try:
        gguf = embedded_gguf()
    except BackboneError as error:
        return str(error)
    folder = converted_folder(DEFAULT_BACKBONE)
    if not folder.exists():
        return "installed, not converted yet (happens by itself at first use)"
    problem = check_converted(folder, digest(gguf))
    return "converted and intact" if problem is None else f"to be converted again: {problem}"


def environment() -> dict[str, Any]:
    """What this installation looks like."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "kveraser": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "default dtype": str(default_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cache folder": str(cache_folder()),
        "embedded model": _embedded_state(),
        "erasers that ship": ", ".join(shipped_erasers()) or "none",
    }


def support(name: str) -> dict[str, str]:
    """Method -> "yes", or why not, for a model."""
    with stderr.status(f"loading {name} ..."):
        model, _ = load_backbone(name)
    try:
        check_model(model)
    except UnsupportedCacheError as error:
        return {method: "yes" if not kind.removes else str(error) for method, kind in methods().items()}
    verdicts = dict.fromkeys(methods(), "yes")
    try:
        rotary_layout(model)
    except UnsupportedCacheError as error:
        for method in ("delete-and-shift", "local-suffix-repair", "selective-recompute"):
            verdicts[method] = str(error)
    try:
        shipped_eraser(model)
    except EraserMismatchError as error:
        verdicts["kveraser"] = f"needs an eraser: {error}"
        verdicts["auto"] = "yes, but always by full-recompute without an eraser"
    return verdicts


def doctor_command(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also load this model and say what works.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, device, caches, and which methods work for a model.

    Exits with 1 when a model is given and no method can erase from its cache.

    Example: kveraser doctor --model smollm2-135m-instruct
    """
    with reported(as_json):
        facts = environment()
        verdicts = support(model) if model else {}
        if as_json:
            print_json({"environment": facts, "methods": verdicts})
        else:
            table = Table(box=None, show_header=False, padding=(0, 1))
            for key, value in facts.items():
                table.add_row(key, str(value))
            stdout.print(table)
            if verdicts:
                stdout.print(f"\n[bold]{model}[/]")
                table = Table(box=None, show_header=False, padding=(0, 1))
                for method, verdict in verdicts.items():
                    table.add_row(method, verdict)
                stdout.print(table)
        if verdicts and verdicts["full-recompute"] != "yes":
            sys.exit(1)
