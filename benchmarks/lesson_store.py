"""What a lesson store brings: the same training with and without one, over some epochs, the first counted.

    python benchmarks/lesson_store.py [--contexts 6] [--steps 2] [--epochs 3] [--repair 64] [--output FOLDER]

Both runs take the same steps in turns, from the same eraser and in one process, and their losses are compared. An example is one
question in one protocol about one erased span. Processor time is what tells on a machine that others use, too.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from measuring import environment, placement, report_table
from rich.table import Table

import kveraser as kv
from kveraser.eraser.config import ActsOn
from kveraser.model.view import finish
from kveraser.readers import calibrate
from kveraser.training import TrainConfig
from kveraser.training.lessons import encoder, read_filler
from kveraser.training.stage import StageRun
from kveraser.training.store import Keeping


def main(
    contexts: Annotated[int, typer.Option(help="Contexts per step.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps per epoch.")] = 2,
    epochs: Annotated[int, typer.Option(help="Epochs.")] = 3,
    least: Annotated[int, typer.Option(help="Length of the shortest contexts.")] = 64,
    most: Annotated[int, typer.Option(help="Length of the longest.")] = 448,
    repair: Annotated[int, typer.Option(help="Readers of each span to recompute.")] = 64,
    acts_on: Annotated[ActsOn, typer.Option(help="Where the eraser runs.")] = "spans",
    model_name: Annotated[str, typer.Option("--model", help="The backbone.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    packed: Annotated[
        int | None, typer.Option("--pack", help="Tokens per forward without the store; default as with it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for lesson_store.json.")] = None,
) -> None:
    """Time both and print examples per second."""
    model, tokenizer = kv.load_backbone(model_name, dtype=dtype)
    plain = TrainConfig()
    options = replace(plain.eraser, acts_on=acts_on, repair=repair)
    stage = replace(
        plain.finetune, contexts=contexts, steps=steps * epochs, epochs=epochs, tokens=(least, most), validation_contexts=1,
    )  # fmt: skip
    config, filler = replace(plain, eraser=options, finetune=stage), read_filler(tokenizer, None)
    text = encoder(tokenizer)(filler.text(random.Random(0), 2000, "train"))[:2000]
    calibration = calibrate(model, text) if repair else None
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, keeping in (("recomputed", None), ("store", Keeping(Path(folder) / "lessons"))):
            eraser = kv.KVEraser.new(model, window=options.window, repair=repair, acts_on=acts_on)
            eraser.calibration = calibration
            runs[name] = StageRun(
                model, tokenizer, config, "finetune", eraser, Path(folder) / name, filler=filler, keeping=keeping
            )
        runs["recomputed"].most = packed or runs["recomputed"].most
        draws = runs["store"].draws
        examples = epochs * sum(
            len(one.lesson.probes) for step in range(steps) for one in draws.of_step(step, range(contexts))
        )
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        processor: dict[str, list[float]] = {name: [] for name in runs}
        apart = 0.0
        for step in range(steps * epochs):
            losses = []
            for name in list(runs)[:: 1 - 2 * (step % 2)]:
                finish(model.device)
                started, before = time.perf_counter(), time.process_time()
                losses.append(runs[name].train_step().loss)
                finish(model.device)
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - before)
            apart = max(apart, abs(losses[0] - losses[1]))
        size = runs["store"].store.pieces.used
    rows = [{"loop": name, "seconds": times, "processor_seconds": processor[name], "examples_per_second": examples / sum(times),
             "later_epochs": examples * (epochs - 1) / epochs / max(sum(times[steps:]), 1e-9),
             "ratio": sum(seconds["recomputed"]) / sum(times),
             "processor_ratio": sum(processor["recomputed"]) / sum(processor[name])} for name, times in seconds.items()]  # fmt: skip
    table = Table("lessons", "examples per second", "in later epochs", "ratio", "of processor time",
                  title=f"{epochs} epochs over {steps * contexts} contexts, losses at most {apart:.1e} apart, "
                        f"store {size / 1e9:.2f} GB")  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["loop"]),
            *(f"{row[key]:.2f}" for key in ("examples_per_second", "later_epochs", "ratio", "processor_ratio")),
        )
    document = {"benchmark": "lesson_store", **environment(model), **placement(model), "torch": torch.__version__,
                "acts_on": acts_on, "repair": repair, "contexts": [least, most], "packed": packed, "store_bytes": size,
                "losses_apart": apart, "rows": rows}  # fmt: skip
    report_table("lesson_store", document, table, output)


if __name__ == "__main__":
    typer.run(main)
