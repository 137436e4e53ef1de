"""The log of a stage: `train.jsonl` and TensorBoard's files.

Knows: files, steps. Does not know what the numbers mean.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class StageLog:
    """`train.jsonl` and TensorBoard, cut back to the step that a run resumes from."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        file = folder / "train.jsonl"
        kept = []
        if step and file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        file.write_text("".join(kept), encoding="utf-8")
        self.stream = file.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Write the numbers of a step (`step` among them); those that are not finite become null."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        self.stream.write(json.dumps(plain) + "\n")
        self.stream.flush()
        for key, value in plain.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, entry["step"])

    def close(self) -> None:
        """Close the files."""
        self.stream.close()
        self.board.close()
