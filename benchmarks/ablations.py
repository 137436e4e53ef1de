"""What matters in training an eraser: short runs that differ in one thing, judged on the same held-out contexts.

    python benchmarks/ablations.py [NAME ...] --output FOLDER [--model NAME] [--steps 40] [--set KEY=VALUE ...] [--store FOLDER]
                                   [--start ERASER] [--text TEXT]

Each prints its validation KL (nats per answer token, asked after the erase / question cached) and is kept in
FOLDER/ablations.json; runs that are there already are not made again. All start from the same eraser, unless their row
says otherwise. With `--store` the lessons, which most rows share, are computed once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kveraser as kv
from kveraser.files import write_atomically
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.training import TrainConfig, read_config
from kveraser.training.distill import Variant
from kveraser.training.lessons import read_filler
from kveraser.training.run import first_eraser
from kveraser.training.stage import StageRun
from kveraser.training.store import Keeping


@dataclass(frozen=True)
class Ablation:
    """One thing that is different: changes of the configuration, or of how spans are steered."""

    about: str
    changes: tuple[str, ...] = ()
    variant: Variant = field(default_factory=Variant)
    from_start: bool = True


COMMON = (
    "eraser.window=[4,512]",
    "eraser.repair=0",
    "eraser.hidden=0",
    "finetune.contexts=4",
    "finetune.tokens=[64,256]",
    "finetune.spacing=128",
    "finetune.learning_rate=6e-4",
    "finetune.warmup=5",
    "finetune.validation_contexts=24",
    "finetune.average=0.9",
)
ONLY_ANSWERS = tuple(f"finetune.weights.{kind}=0" for kind in ("other", "continuation", "cue"))
ABLATIONS = {
    "control": Ablation("window (4, 512), repair 0, dense, KL"),
    "stage-2-only": Ablation("without pre-training", from_start=False),
    "rank-4": Ablation("rank 4, alpha 8; without pre-training", ("eraser.rank=4", "eraser.alpha=8"), from_start=False),
    "rank-8": Ablation(
        "rank 8, alpha 16; without pre-training", ("eraser.rank=8", "eraser.alpha=16"), from_start=False
    ),
    "rank-64": Ablation(
        "rank 64, alpha 128; without pre-training", ("eraser.rank=64", "eraser.alpha=128"), from_start=False
    ),
    "full-prefix": Ablation("the whole prefix", ("eraser.window=null",)),
    "window-32": Ablation("window (4, 32)", ("eraser.window=[4,32]",)),
    "window-128": Ablation("window (4, 128)", ("eraser.window=[4,128]",)),
    "repair-16": Ablation("steer and repair 16", ("eraser.repair=16",)),
    "repair-32": Ablation("steer and repair 32", ("eraser.repair=32",)),
    "repair-64": Ablation("steer and repair 64", ("eraser.repair=64",)),
    "learned-16": Ablation(
        "neutral spans, the LoRA on 16 readers", ("eraser.repair=16", "eraser.acts_on=readers"), from_start=False
    ),
    "suffix-aware": Ablation("the span sees the suffix", variant=Variant(suffix_aware=True)),
    "content-blind": Ablation("newlines in place of the span's tokens", variant=Variant(placeholder=198)),
    "answers-only": Ablation("no dense supervision", ONLY_ANSWERS),
    "cross-entropy": Ablation("KL + 0.3 cross-entropy on gold answers", ("finetune.cross_entropy=0.3",)),
    "neutral-start": Ablation("a start close to neutral", ("eraser.hidden=8",), from_start=False),
    "learned-values": Ablation(
        "values that the LoRA makes alone, less hidden", ("eraser.values=learned", "eraser.hidden=3"), from_start=False
    ),
    "longer": Ablation("contexts of 64 to 1024 tokens", ("finetune.tokens=[64,1024]",)),
}


def configuration(ablation: Ablation, steps: int, text: str | None, common: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a run; `common` are changes for all of them."""
    changes = [*COMMON, f"finetune.steps={steps}", f"finetune.validate_every={steps}", *common, *ablation.changes]
    return read_config(changes=changes, text=text)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; default all.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the runs and ablations.json.")] = Path("ablations"),
    steps: Annotated[int, typer.Option(help="Optimiser steps of each run.")] = 40,
    start: Annotated[Path | None, typer.Option(help="A pre-trained eraser to start from.")] = None,
    text: Annotated[str | None, typer.Option(help="Text around the spans.")] = None,
    model_name: Annotated[str, typer.Option("--model", help="The backbone.")] = DEFAULT_BACKBONE,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default bf16 where the device computes in it.")
    ] = None,
    common: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for all runs; repeatable.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder to keep lessons in.")] = None,
) -> None:
    """Run ablations one after the other.

    Example: python benchmarks/ablations.py neutral-start learned-values --output ablations --store lessons --set finetune.contexts=6
    """
    file = output / "ablations.json"
    settings = {
        "steps": steps,
        "start": start and str(start),
        "text": text,
        "model": model_name,
        "dtype": dtype,
        "set": list(common or ()),
    }
    found: dict[str, dict[str, Any]] = {}
    if file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier.get("settings") != settings:
            raise SystemExit(
                f"{file} is of runs with other settings ({earlier.get('settings')}); give another --output, or delete it"
            )
        found = earlier["runs"]
    model, tokenizer = kv.load_backbone(model_name, dtype=dtype)
    for name in names or ABLATIONS:
        if name in found:
            continue
        ablation = ABLATIONS[name]
        config = configuration(ablation, steps, text, common or ())
        filler = read_filler(tokenizer, config.text)
        eraser = first_eraser(model, tokenizer, filler, config, start if ablation.from_start else None)
        keeping = Keeping(store) if store else None
        run = StageRun(
            model, tokenizer, config, "finetune", eraser, output / name, filler=filler, keeping=keeping,
            variant=ablation.variant,
        )  # fmt: skip
        if name != "control":  # all are judged on the same contexts
            control = configuration(ABLATIONS["control"], steps, text, common or ())
            run.held_out = StageRun(
                model, tokenizer, control, "finetune", kv.KVEraser.new(model, rank=1), output / ".held-out"
            ).held_out
        validation = run.run()
        if validation is None:
            raise SystemExit(f"{output / name} holds a finished run that {file.name} does not know; delete it")
        found[name] = {"about": ablation.about, "after": validation.after, "cached": validation.cached}
        write_atomically(file, json.dumps({"settings": settings, "runs": found}, indent=2).encode())
        Console().print(f"{name}: {validation.after:.4f} / {validation.cached:.4f}")
    table = Table("run", "", "KL after", "KL cached", title=f"{steps} steps")
    for name, row in found.items():
        table.add_row(name, row["about"], f"{row['after']:.4f}", f"{row['cached']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
