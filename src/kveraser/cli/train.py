"""`kveraser train pretrain | finetune | all`: train an eraser for a model."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli import options as opt
from kveraser.cli.common import load, print_json, progress_bar, reported, stderr, stdout
from kveraser.errors import OptionError
from kveraser.training import LIMIT, PRESETS, STAGES, StageName, read_config, train_eraser
from kveraser.training import Progress as Step

app = typer.Typer(
    help="Train an eraser for a model: span-neighbor pre-training, then fine-tuning on tasks.\n\n"
    "Example: kveraser train all -o my-eraser --preset tiny",
    no_args_is_help=True,
)

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run; the result is in OUTPUT/eraser.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with any of the keys.")]
PresetOption = Annotated[str, typer.Option(help=f"Configuration to start from: {', '.join(PRESETS)}.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="KEY=VALUE, such as finetune.steps=800; repeatable.")
]
TextOption = Annotated[
    str | None,
    typer.Option(help="Text around the spans: a file, a folder, hf:DATASET; default Python's documentation."),
]
SeedOption = Annotated[int | None, typer.Option(help="Of the LoRA's start and of all data.")]
StartOption = Annotated[Path | None, typer.Option(help="An eraser to start from, instead of a new one.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew; without it a run goes on from its checkpoint.")]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU where Accelerate would take a GPU.")]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep what never changes of the lessons (states, readers, teacher) here, also for other runs; default "
        "OUTPUT/lessons where a stage has several epochs."
    ),
]
LimitOption = Annotated[float, typer.Option(help="Gigabytes that the store may have.")]
HubOption = Annotated[str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result as this repo.")]


def _train(
    stages: tuple[StageName, ...], output: Path, model: str, config: Path | None, preset: str,
    changes: list[str] | None, text: str | None, seed: int | None, start: Path | None, fresh: bool, cpu: bool,
    dtype: str | None, push_to_hub: str | None, store: Path | None, store_limit: float, as_json: bool,
) -> None:  # fmt: skip
    from accelerate import Accelerator

    with reported(as_json):
        given = [*(changes or []), *([f"seed={seed}"] if seed is not None else [])]
        settings = read_config(config, preset, given, text=text)
        if not 0 < store_limit < math.inf:
            raise OptionError(f"--store-limit {store_limit} must be above 0 gigabytes, and a number")
        accelerator = Accelerator(cpu=cpu)
        main = accelerator.is_main_process
        if main and push_to_hub:
            _check_token(push_to_hub)
        backbone, tokenizer = load(model, str(accelerator.device), dtype, quiet=as_json or not main)
        history: dict[str, Step] = {}
        with progress_bar() as bar:
            rows = {name: bar.add_task(name, total=settings.stage(name).steps, visible=main) for name in stages}

            def report(step: Step) -> None:
                if step.validation or step.stage not in history:
                    history[step.stage] = step
                said = f"{step.stage}  best KL {step.best:.4f}"
                if not math.isnan(step.kl):
                    said += f"  loss {step.loss:.3f}  KL {step.kl:.3f}  EM {step.exact_match:.0%}"
                    said += f"  {step.spans_per_second:.1f} spans/s"
                bar.update(rows[step.stage], description=said, total=step.steps, completed=step.step)

            eraser = train_eraser(
                backbone, tokenizer, settings, output, stages=stages, start=start, fresh=fresh,
                accelerator=accelerator, report=report, store=store, store_limit=int(store_limit * 1e9),
            )  # fmt: skip
        if not main:
            return
        folder = output / "eraser"
        url = eraser.push_to_hub(push_to_hub, folder=folder) if push_to_hub else None
        if as_json:
            kept = store or (output / "lessons" if any(settings.stage(name).epochs > 1 for name in stages) else None)
            best = {name: step.best for name, step in history.items()}
            print_json({"eraser": str(folder), "best_validation_kl": best, "url": url, "store": kept and str(kept)})
            return
        for name, step in history.items():
            stdout.print(f"{name}: best validation KL {step.best:.4f} nats per answer token")
        stdout.print(f"the eraser is in {folder}" + (f" and at {url}" if url else ""))
        command = shlex.join(["kveraser", "eval", "--model", model, "--eraser", str(folder)])
        stderr.print(f"judge it: {command}", style="dim", markup=False, soft_wrap=True)


def _check_token(repo: str) -> None:
    """Raise `OptionError` where nobody is logged in, before hours of training rather than after them."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise OptionError(
            f"--push-to-hub {repo} needs a token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN"
        )


_COMMANDS: dict[str, tuple[tuple[StageName, ...], str]] = {
    "pretrain": (
        ("pretrain",),
        """The first stage alone: span-neighbor pre-training on generic text.

        Example: kveraser train pretrain -o my-eraser --text corpus.txt --set pretrain.steps=200
        """,
    ),
    "finetune": (
        ("finetune",),
        """The second stage alone: fine-tuning on the data tasks, from OUTPUT/pretrain where it is there.

        Example: kveraser train finetune -o my-eraser --set 'finetune.tasks=\\[needle,injection]'
        """,
    ),
    "all": (
        STAGES,
        """Both stages. Stop it at any time, also by Ctrl-C; the same command goes on from the last checkpoint.

        Example: kveraser train all -o my-eraser --preset tiny
        On several GPUs: accelerate launch -m kveraser train all -o my-eraser --preset gpu --model Qwen/Qwen3-8B
        """,
    ),
}


def _register(name: str, stages: tuple[StageName, ...], about: str) -> None:
    """A command that runs stages; all have the same options."""

    @app.command(name, help=about)
    def command(
        output: OutputOption, model: opt.Model = opt.DEFAULT_MODEL, config: ConfigOption = None,
        preset: PresetOption = "cpu", changes: SetOption = None, text: TextOption = None, seed: SeedOption = None,
        start: StartOption = None, fresh: FreshOption = False, cpu: CpuOption = False, dtype: opt.Dtype = None,
        push_to_hub: HubOption = None, store: StoreOption = None, store_limit: LimitOption = LIMIT / 1e9,
        as_json: opt.Json = False,
    ) -> None:  # fmt: skip
        _train(stages, output, model, config, preset, changes, text, seed, start, fresh, cpu, dtype, push_to_hub,
               store, store_limit, as_json)  # fmt: skip


for _name, (_stages, _about) in _COMMANDS.items():
    _register(_name, _stages, _about)
