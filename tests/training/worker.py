"""A short run in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace

import torch

from conftest import make_tokenizer, text_model
from kveraser.training import EraserOptions, Stage, TrainConfig, train_eraser


def learn(output, corpus, answer, kill_at=None):
    """Train; write the losses and hashes of the final weights to the file `answer`. With `kill_at`, be killed after that step."""
    torch.set_num_threads(1)
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
    answer.write_text(json.dumps({"losses": losses, "best": digest, "last": last}))
