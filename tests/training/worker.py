"""A short run in a process of its own: `worker.py OUTPUT CORPUS [KILL_AT]` prints its losses and the final weights' hash."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tokenizer, text_model
from kveraser.training import EraserOptions, Stage, TrainConfig, train_eraser


def main() -> None:
    torch.set_num_threads(1)
    output, corpus = Path(sys.argv[1]), sys.argv[2]
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else None
    stage = Stage(
        ("needle", "in-context"), steps=6, contexts=3, tokens=(24, 80), spacing=40, spans=2, learning_rate=5e-3, warmup=2,
        average=0.5, validate_every=3, validation_contexts=3, checkpoint_every=2,
    )  # fmt: skip
    config = TrainConfig(EraserOptions(rank=2, alpha=4, window=(2, 16)), stage, replace(stage), corpus)
    losses = []

    def report(step):
        losses.append(step.loss)
        if step.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    eraser = train_eraser(text_model(), make_tokenizer(), config, output, stages=["finetune"], report=report)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in eraser.parameters())).hexdigest()
    state = torch.load(output / "finetune" / "checkpoint.pt", weights_only=True)
    last = hashlib.sha256(b"".join(w.numpy().tobytes() for w in state["weights"])).hexdigest()
    line = {"losses": losses, "best": digest, "last": last, "rank": os.environ.get("RANK", "0")}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
