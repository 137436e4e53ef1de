"""The log of a stage: `train.jsonl` and TensorBoard's files.

Knows: files, steps. Does not know what the numbers mean.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kveraser.files import write_atomically
from kveraser.training.folders import saving
from kveraser.training.own import BOARD, LOG


class StageLog:
    """`train.jsonl` and TensorBoard, cut back to the step that a run resumes from."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / LOG
        kept = []
        with self._saving():
            if step and self.file.exists():
                lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(self.file, "".join(kept).encode())
            self.stream = self.file.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def _saving(self) -> AbstractContextManager[None]:
        return saving(
            f"write the log {self.file}",
            "The last checkpoint is there: make room, and the same command goes on from it",
        )

    def write(self, entry: dict[str, Any]) -> None:
        """Write the numbers of a step (`step` among them); those that are not finite become null."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        with self._saving():
            self.stream.write(json.dumps(plain) + "\n")
            self.stream.flush()
            for key, value in plain.items():
                if key != "step" and value is not None:
                    self.board.add_scalar(key, value, entry["step"])

    def close(self) -> None:
        """Close the files."""
        with self._saving():
            self.stream.close()
            self.board.close()
