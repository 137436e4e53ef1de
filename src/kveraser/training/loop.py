"""A plain training loop: one example after the other, gradients summed over a batch.

Knows: optimisers, tasks, files. Does not know how a loss is made.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.cache import Window
from kveraser.eraser import KVEraser
from kveraser.errors import OptionError
from kveraser.model_view import causal_lm, frozen
from kveraser.tasks import EraseExample, Filler, Sizes, as_task, read_passages, tasks
from kveraser.training.distill import prepare, student_loss


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    Attributes:
        examples: training examples in all.
        batch: examples per optimiser step.
        learning_rate, weight_decay, warmup_steps: of AdamW, with a cosine down to a tenth.
        average: decay per step of the running mean of the weights, which is what is judged and saved (batches are small).
        cross_entropy_weight: of the gold answers' cross-entropy, beside KL.
        rank, alpha, window, repair: of the eraser.
        tasks: names; each example draws one.
        prefix, suffix: lengths in tokens, `(least, most)`.
        text: a file or folder of text for the surroundings; None for Python's own documentation.
        validate_every: optimiser steps between validations.
        validation_examples: held-out examples of each validation.
    """

    examples: int = 400
    batch: int = 4
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 10
    average: float = 0.97
    cross_entropy_weight: float = 0.0
    rank: int = 16
    alpha: int = 32
    window: Window | None = (4, 128)
    repair: int = 0
    tasks: tuple[str, ...] = field(default_factory=lambda: tuple(tasks()))
    prefix: tuple[int, int] = (16, 160)
    suffix: tuple[int, int] = (16, 192)
    text: str | None = None
    seed: int = 42
    validate_every: int = 30
    validation_examples: int = 24

    def __post_init__(self) -> None:
        if min(self.examples, self.batch, self.validate_every, self.validation_examples) < 1:
            raise OptionError("examples, batch, validate_every and validation_examples must be at least 1")
        for name in self.tasks:
            as_task(name)


@dataclass(frozen=True)
class Progress:
    """Where a run is: after `step` of `steps`, with the mean loss since the last report."""

    step: int
    steps: int
    loss: float
    validation: float | None
    examples_per_second: float


def mixed_examples(config: TrainConfig, filler: Filler, split: str, seed: int) -> Iterator[EraseExample]:
    """Examples of the configured tasks, drawn with equal chance."""
    sizes = Sizes(config.prefix, config.suffix)
    sources = [as_task(name).examples(filler, sizes, split, seed) for name in config.tasks]  # type: ignore[arg-type]
    rng = random.Random(seed)
    while True:
        yield next(rng.choice(sources))


def train_eraser(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    output: Path,
    *,
    start: KVEraser | None = None,
    report: Callable[[Progress], None] | None = None,
) -> KVEraser:
    """Train an eraser; the best by validation loss is in `output` whenever the run ends, however it ends.

    Args:
        start: an eraser to go on from; None starts a new one.
        report: called after every step.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    filler = Filler(read_passages(config.text), lambda text: len(encode(text)))
    eraser = start or KVEraser.new(
        model, rank=config.rank, alpha=config.alpha, window=config.window, repair=config.repair, seed=config.seed
    )
    eraser.train()
    backbone = frozen(causal_lm(model))
    steering = eraser.attached(backbone)
    steps = math.ceil(config.examples / config.batch)
    optimizer = torch.optim.AdamW(eraser.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / config.warmup_steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    source = mixed_examples(config, filler, "train", config.seed)
    held_out = [
        prepare(example, encode)
        for example in itertools.islice(mixed_examples(config, filler, "eval", config.seed), config.validation_examples)
    ]

    def loss_of(example: EraseExample) -> torch.Tensor:
        return student_loss(
            backbone, steering, prepare(example, encode), window=eraser.window,
            cross_entropy_weight=config.cross_entropy_weight,
        )  # fmt: skip

    @torch.no_grad()
    def validate() -> float:
        losses = [
            student_loss(backbone, steering, e, window=eraser.window, cross_entropy_weight=0.0).item() for e in held_out
        ]
        return sum(losses) / len(losses)

    mean = [parameter.detach().clone() for parameter in eraser.parameters()]

    @contextmanager
    def averaged() -> Iterator[None]:
        """The running mean of the weights in place of the current ones."""
        current = [parameter.data for parameter in eraser.parameters()]
        for parameter, value in zip(eraser.parameters(), mean, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(eraser.parameters(), current, strict=True):
                parameter.data = value

    best, clock, done = validate(), time.perf_counter(), 0
    if report:
        report(Progress(0, steps, math.nan, best, 0.0))
    output.mkdir(parents=True, exist_ok=True)
    with (output / "train.jsonl").open("a", encoding="utf-8") as log:
        for step in range(1, steps + 1):
            total = 0.0
            for _ in range(config.batch):
                loss = loss_of(next(source)) / config.batch
                if not torch.isfinite(loss):
                    raise OptionError(
                        f"the loss became {loss.item()} at step {step}; lower learning_rate={config.learning_rate}"
                    )
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(eraser.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += config.batch
            decay = min(config.average, step / (step + 10))
            for value, parameter in zip(mean, eraser.parameters(), strict=True):
                value.lerp_(parameter.detach(), 1 - decay)
            validation = None
            if step % config.validate_every == 0 or step == steps:
                with averaged():
                    validation = validate()
                    if validation <= best or step <= config.validate_every:
                        best = validation
                        _save(eraser, output / "best", config, {"step": step, "validation_kl": validation})
            speed = done / (time.perf_counter() - clock)
            log.write(json.dumps({"step": step, "loss": total, "validation_kl": validation, "best": best}) + "\n")
            log.flush()
            if report:
                report(Progress(step, steps, total, validation, speed))
    return KVEraser.from_pretrained(output / "best", model)


def _save(eraser: KVEraser, folder: Path, config: TrainConfig, notes: dict[str, float]) -> None:
    """Write a checkpoint beside the old one, then exchange the two."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    settings = {**asdict(config), "text": config.text and Path(config.text).name}  # no path of this machine
    eraser.save_pretrained(fresh, notes={"training": settings, **notes})
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
