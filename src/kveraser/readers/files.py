"""Calibrations on disk: in an eraser's folder, or in the cache folder for models that have none.

Knows: one safetensors file with checksum and format. Does not know how calibrations are made or used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kveraser.errors import CalibrationError
from kveraser.files import cache_folder, write_atomically
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers.calibration import Calibration
from kveraser.readers.probes import Probe
from kveraser.readers.source import Source, as_source

FILE_NAME = "readers.safetensors"
FORMAT = 2
_MATRICES = ("down", "up")
_VECTORS = ("mean", "scale", "bias")
_FACTS = ("layer", "sources", "heads", "scaling", "explained", "key_heads")


def write_calibration(file: Path, calibration: Calibration, *, private: bool = False) -> None:
    """Write a calibration; maps in float16, which costs them nothing that can be measured.

    Args:
        private: its user alone can read it, as where it was made of what a model happened to read.
    """
    if calibration.scan is None:
        raise CalibrationError("a calibration without probes is made anew each time; it is not worth keeping")
    tensors = {"neutral": calibration.neutral.float()}
    probes = []
    for index, probe in enumerate((calibration.scan, *calibration.probes)):
        for name in (*_MATRICES, *_VECTORS):
            kept = getattr(probe, name)
            tensors[f"{index}.{name}"] = (
                kept.to(torch.float16 if name in _MATRICES else torch.float32).cpu().contiguous()
            )
        about = (probe.layer, probe.sources, probe.heads, probe.scaling, round(probe.explained, 4), probe.key_heads)
        probes.append(dict(zip(_FACTS, about, strict=True)))
    tensors["neutral"] = tensors["neutral"].cpu().contiguous()
    about_all = {"fingerprint": asdict(calibration.fingerprint), "probes": probes}
    body = json.dumps(about_all, sort_keys=True)
    metadata = {"format": str(FORMAT), "calibration": body, "sha256": _checksum(body, tensors)}
    write_atomically(file, save(tensors, metadata), private=private)


def read_calibration(file: Path) -> Calibration:
    """Read a calibration.

    Raises:
        CalibrationError: missing, damaged, or of a newer format.
    """
    try:
        with safe_open(str(file), "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if int(metadata["format"]) > FORMAT:
            raise CalibrationError(
                f"{file} has format {metadata['format']}, this version reads {FORMAT}; update kveraser"
            )
        if metadata["sha256"] != _checksum(metadata["calibration"], tensors):
            raise CalibrationError(f"{file} is damaged: its checksum does not fit; delete it, it is made again")
        about = json.loads(metadata["calibration"])
        probes = [_probe(index, entry, tensors) for index, entry in enumerate(about["probes"])]
        return Calibration(Fingerprint(**about["fingerprint"]), probes[0], tuple(probes[1:]), tensors["neutral"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{file} cannot be read as probes of a model: {error!r}") from error


def cached_file(model: nn.Module | Source) -> Path:
    """Where the calibration of a model is kept."""
    about = json.dumps([FORMAT, asdict(as_source(model).fingerprint)], sort_keys=True)
    return cache_folder() / "readers" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"


def _probe(index: int, about: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
    parts = {name: tensors[f"{index}.{name}"].float() for name in (*_MATRICES, *_VECTORS)}
    some = about.get("key_heads")  # format 1 told all heads
    return Probe(
        about["layer"], tuple(about["sources"]), about["heads"], about["scaling"], **parts,
        explained=about["explained"], key_heads=None if some is None else tuple(some),
    )  # fmt: skip


def _checksum(body: str, tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
