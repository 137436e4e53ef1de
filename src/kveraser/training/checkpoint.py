"""The state of a run on disk: all of it in one file that is replaced whole, so that a run can be killed at any moment.

Knows: tensors, one file. Does not know what they mean.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from kveraser.errors import TrainingError
from kveraser.files import write_atomically
from kveraser.training.folders import saving

FILE_NAME = "checkpoint.pt"
_UNKNOWN = "not noted"
"""Of what the run of an earlier version, or one that does not depend on it, says nothing."""


@dataclass
class Checkpoint:
    """Where a stage is.

    Attributes:
        run: what the run depends on; a checkpoint of another run is refused.
        step: optimiser steps done.
        weights, mean: of the eraser, and their running mean.
        optimizer: state of the optimiser.
        best: lowest validation KL so far.
        waited: validations since then.
    """

    run: dict[str, Any]
    step: int
    weights: list[Tensor]
    mean: list[Tensor]
    optimizer: dict[str, Any]
    best: float
    waited: int

    def save(self, folder: Path) -> None:
        """Write the checkpoint; the old one stays until the new one is whole.

        Raises:
            TrainingError: it cannot be written (disk full, no permission).
        """
        buffer = io.BytesIO()
        torch.save(vars(self), buffer)
        then = "The one before it is still there: make room, and the same command goes on from it"
        with saving(f"save a checkpoint to {folder} at step {self.step}", then):
            write_atomically(folder / FILE_NAME, buffer.getvalue())


def load_checkpoint(folder: Path, run: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint in a folder; None when there is none.

    Raises:
        TrainingError: it cannot be read, or belongs to another run.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return None
    try:
        with ZipFile(file) as parts:
            if (bad := parts.testzip()) is not None:  # which PyTorch does not look at
                raise ValueError(f"the checksum of {bad} does not fit")
        state = Checkpoint(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises pickle's, zip's and its own errors
        raise TrainingError(f"cannot read {file}: {error}; delete it to start the stage anew") from error
    found = difference(state.run, run)
    if found is not None:
        raise TrainingError(
            f"{file} is of another run: {found}. Choose another output folder, give the same options again, or start anew "
            "with --fresh"
        )
    return state


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first entry that is not the same in what a run depends on, in words; None when there is none."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            inner = difference(before, now)
            if inner is not None:
                return f"{key}.{inner}"
        elif before != now:
            return f"{key} was {old.get(key, _UNKNOWN)}, now it is {new.get(key, _UNKNOWN)}"
    return None
