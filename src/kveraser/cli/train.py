"""`kveraser train`: train an eraser for a model with the plain loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    load,
    progress_bar,
    reported,
    stdout,
)
from kveraser.eraser import KVEraser
from kveraser.errors import OptionError
from kveraser.training import Progress, TrainConfig, train_eraser


def parse_window(text: str) -> tuple[int, int] | None:
    """`SINK,LOCAL`, or `none` for the whole prefix."""
    if text == "none":
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise OptionError(f"--window {text!r} is neither SINK,LOCAL (such as 4,128) nor none")
    return int(parts[0]), int(parts[1])


def train_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the log and the best eraser (best/).")],
    model: ModelOption = DEFAULT_MODEL,
    examples: Annotated[int, typer.Option(min=1, help="Training examples.")] = 400,
    text: Annotated[str | None, typer.Option(help="Text for the surroundings; default Python's documentation.")] = None,
    window: Annotated[str, typer.Option(help="SINK,LOCAL slots the eraser sees; none for the whole prefix.")] = "4,128",
    learning_rate: Annotated[float, typer.Option(min=0.0)] = TrainConfig.learning_rate,
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = TrainConfig.batch,
    cross_entropy: Annotated[float, typer.Option(min=0.0, help="Weight of the gold answers beside KL.")] = 0.0,
    seed: Annotated[int, typer.Option()] = TrainConfig.seed,
    start: Annotated[Path | None, typer.Option(help="An eraser to go on from.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Train an eraser by self-distillation from full recomputation (about 1.5 s per example on two CPU cores).

    The best eraser so far is in OUTPUT/best whenever the run ends, also by Ctrl-C; go on from it with --start.

    Example: kveraser train --output my-eraser --examples 800 --text corpus.txt
    """
    with reported():
        config = TrainConfig(
            examples=examples, batch=batch, learning_rate=learning_rate, cross_entropy_weight=cross_entropy,
            window=parse_window(window), text=text, seed=seed,
        )  # fmt: skip
        backbone, tokenizer = load(model, device, dtype)
        first = KVEraser.from_pretrained(start, backbone) if start else None
        if first is not None:
            config = replace(config, window=first.window, rank=first.lora_config.r)
        with progress_bar() as bar:
            task = bar.add_task("validating", total=None)
            best = float("inf")

            def report(progress: Progress) -> None:
                nonlocal best
                best = min(best, progress.validation or best)
                said = f"loss {progress.loss:.3f}  best KL {best:.4f}  {progress.examples_per_second:.2f}/s"
                bar.update(task, description=said, total=progress.steps, completed=progress.step)

            train_eraser(backbone, tokenizer, config, output, start=first, report=report)
        stdout.print(f"best validation KL {best:.4f}; the eraser is in {output / 'best'}")
