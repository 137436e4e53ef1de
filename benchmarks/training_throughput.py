"""How fast an eraser trains: lessons that share prefills, against one example at a time without any reuse.

    python benchmarks/training_throughput.py [--tokens 512] [--steps 3] [--output FOLDER]

An example is one question in one protocol about one erased span. Both loops learn from the same examples, and on no
others; the loop without reuse prefills the context, recomputes the teacher and steers anew for each of them. Forward and
backward are timed, interleaved, in one process; medians.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import kveraser as kv
from kveraser.model.attention import for_packing
from kveraser.model.view import finish
from kveraser.readers import calibrate
from kveraser.tasks import Filler, as_task, read_passages, tasks
from kveraser.training.distill import judge
from kveraser.training.lessons import Erase, Lesson, LessonPlan
from kveraser.training.losses import distillation_loss
from kveraser.training.prepared import prepare
from kveraser.training.rereading import Repairing

WINDOW, REPAIR = (4, 512), 64


def one_by_one(lesson: Lesson) -> list[Lesson]:
    """The same examples, each as a lesson of its own that holds nothing else."""
    found = []
    for erase in lesson.erases:
        for probe in erase.probes:
            questions = lesson.questions if probe.cached is None else (lesson.questions[probe.cached],)
            alone = probe if probe.cached is None else replace(probe, cached=0)
            questions = questions if alone.cached is not None else ((0,),)
            found.append(Lesson(lesson.ids, (Erase(erase.spans, (alone,)),), questions))
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Length of the contexts.")] = 512,
    steps: Annotated[int, typer.Option(help="Contexts to time.")] = 5,
    spacing: Annotated[int, typer.Option(help="Tokens of context per span.")] = 192,
    together: Annotated[float, typer.Option(help="Chance that all spans are erased at once.")] = 0.5,
    output: Annotated[Path | None, typer.Option(help="Folder for throughput.json.")] = None,
) -> None:
    """Time both loops and print examples per second."""
    model, tokenizer = kv.load_backbone()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    filler = Filler(read_passages(), lambda text: len(encode(text)))
    weights = {"query_after": 1.0, "query_cached": 1.0}
    plan = LessonPlan(tuple(map(as_task, tasks())), (tokens, tokens), spacing, 8, together, weights)
    eraser = kv.KVEraser.new(model, window=WINDOW, repair=REPAIR).train()
    base = for_packing(model)
    steering = eraser.attached(base)
    text = encode(filler.text(random.Random(0), 2000, "train"))[:2000]
    repairing = Repairing(REPAIR, calibrate(model, text))

    def learn(lessons: list[Lesson]) -> float:
        finish(model.device)
        started = time.perf_counter()
        for lesson in lessons:
            judged = judge(base, steering, prepare(base, [lesson], repairing), window=WINDOW)
            distillation_loss(judged.teacher, judged.student, judged.targets, judged.gold).mean().backward()
        finish(model.device)
        return time.perf_counter() - started

    rows = []
    for step in range(steps + 1):
        lesson = plan.make(random.Random(step), filler, encode, "train")
        alone = one_by_one(lesson)
        shared = learn([lesson]) / len(alone)
        single = statistics.mean(learn([one]) for one in alone)
        if step:  # the first one warms up
            rows.append({"tokens": len(lesson.ids), "examples": len(alone), "shared": shared, "single": single})
    fast, slow = (1 / statistics.median(row[key] for row in rows) for key in ("shared", "single"))
    ratio = statistics.median(row["single"] / row["shared"] for row in rows)
    table = Table("loop", "examples per second", "ratio", title=f"training on contexts of about {tokens} tokens")
    table.add_row("one example at a time", f"{slow:.2f}", "1.0")
    table.add_row("lessons", f"{fast:.2f}", f"{ratio:.1f}")
    Console().print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": sys.version.split()[0],
                 "device": str(model.device), "dtype": str(model.dtype), "seconds_per_example": rows,
                 "examples_per_second": {"one_by_one": slow, "lessons": fast}, "ratio": ratio}  # fmt: skip
        (output / "training_throughput.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
