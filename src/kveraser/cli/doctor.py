"""`kveraser doctor`: versions, device, threads, caches, the named backbones, and what is supported for a model."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from kveraser import __version__
from kveraser.cache import check_model
from kveraser.cli import options as opt
from kveraser.cli.common import print_json, reported, stderr, stdout
from kveraser.eraser import default_eraser, shipped_erasers
from kveraser.errors import BackboneError, UnsupportedCacheError
from kveraser.files import cache_folder
from kveraser.methods import methods
from kveraser.model.backbone import check_converted, converted_folder, default_dtype, load_backbone
from kveraser.model.backbone_files import local_gguf, remedies
from kveraser.model.names import BACKBONES, NamedBackbone
from kveraser.model.rope import rotary_layout
from kveraser.model.view import key_biases, model_dtype
from kveraser.readers import known_calibration

_READ_WHOLE = 200_000_000  # bytes of a GGUF file; weights from larger ones take too long to read for a look
_KINDS = {"trained": "the trained eraser that ships for it", "neutral": "the neutral eraser, which needs no training"}
_LARGE_BIAS = 16.0
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "gguf")


def backbone_state(known: NamedBackbone) -> str:
    """What is here of a named backbone, without loading it."""
    folder = converted_folder(known.name)
    problem = "not converted yet"
    if folder.exists():
        quick = known.size > _READ_WHOLE
        found = check_converted(folder, known.sha256, quick=quick)
        if found is None:
            return "converted" if quick else "converted and intact"
        problem = f"to be converted again: {found}"
    try:
        file = local_gguf(known)
    except BackboneError as error:
        return str(error)
    if file is None:
        return f"not there. {remedies(known)}"
    return f"file there, {problem} (happens by itself at first use)"


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
        "erasers that ship": ", ".join(shipped_erasers()) or "none",
        "published erasers": 'Qwen3-8B: kv.KVEraser.from_pretrained("Graph-COM/KVEraser", model)',
    }


def support(model: PreTrainedModel) -> dict[str, str]:
    """Method -> "yes", or why not, for a model."""
    try:
        check_model(model)
    except UnsupportedCacheError as error:
        return {method: "yes" if not kind.removes else str(error) for method, kind in methods().items()}
    verdicts = dict.fromkeys(methods(), "yes")
    try:
        rotary_layout(model)
    except UnsupportedCacheError as error:
        verdicts |= {name: str(error) for name, kind in methods().items() if kind.moves_keys}
    verdicts["kveraser"] = f"yes, with {_KINDS[default_eraser(model).kind]}"
    return verdicts


def about(model: PreTrainedModel) -> dict[str, str]:
    """What decides which method is good for a model: whether moving keys loses something, and who can be seen reading."""
    dtype = model_dtype(model)
    bias = max((float(each.abs().max()) for each in key_biases(model)), default=0.0)
    said = f"the largest key bias is {bias:.0f}" if bias else "its keys have no bias"
    if dtype == torch.float32:
        moving = f"keys are not rounded noticeably in float32 ({said})"
    elif bias > _LARGE_BIAS:
        moving = f"lossy: {said}, and {dtype} rounds such keys again; use kveraser, which moves nothing"
    else:
        moving = f"each move rounds keys again in {dtype}; {said}"
    found = default_eraser(model).calibration or known_calibration(model)
    if found is None:
        probes = "not calibrated yet; happens at the first erase, once"
    elif found.tells:
        layers = ", ".join(str(probe.layer) for probe in found.probes)
        probes = f"told from layers {layers}; probes explain at least {found.explained:.0%} of the queries"
    else:
        probes = f"cannot be told: probes explain {found.explained:.0%} of the queries; the next tokens are recomputed instead"
    return {"moving keys": moving, "readers": probes, "eraser": _KINDS[default_eraser(model).kind]}


def doctor_command(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also load this model and say what works.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Show versions, device, caches, which named backbones are there, and which methods work for a model.

    Exits with 1 when a model is given and no method can erase from its cache.

    Example: kveraser doctor --model smollm2-135m-instruct
    """
    with reported(as_json):
        facts = environment()
        states = {name: backbone_state(known) for name, known in BACKBONES.items()}
        verdicts: dict[str, str] = {}
        found: dict[str, str] = {}
        if model:
            with stderr.status(f"loading {model} ..."):
                loaded, _ = load_backbone(model)
            verdicts = support(loaded)
            found = about(loaded) if verdicts["full-recompute"] == "yes" else {}
        if as_json:
            print_json({"environment": facts, "backbones": states, "methods": verdicts, "model": found})
        else:
            _show(facts)
            stdout.print("\n[bold]backbones by name[/]")
            _show(states)
            if verdicts:
                stdout.print(f"\n[bold]{model}[/]")
                _show(found)
                stdout.print("\n[bold]methods[/]")
                _show(verdicts)
        if verdicts and verdicts["full-recompute"] != "yes":
            sys.exit(1)


def _show(rows: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    stdout.print(table)
