"""A whole run: which stages, from what, into which folders.

Knows: erasers, folders. Does not know how a stage trains.

    OUTPUT/config.yaml
    OUTPUT/pretrain/   checkpoint.pt  best/  train.jsonl  tensorboard/
    OUTPUT/finetune/   the same, from the best of pretrain where there is one
    OUTPUT/eraser/     the best of the last stage that was run
    OUTPUT/.lock       held by the run
    OUTPUT/lessons/    what never changes of the lessons, where there are several epochs and no other folder is given
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.eraser import KVEraser
from kveraser.errors import EraserMismatchError, OptionError
from kveraser.tasks import ChatForm, Filler
from kveraser.training.config import STAGES, StageName, TrainConfig
from kveraser.training.folders import held, recover, replacing, saving
from kveraser.training.lessons import encoder, read_filler
from kveraser.training.neutral import hide
from kveraser.training.own import BEST, OPTIONS, RESULT, check_eraser, check_own
from kveraser.training.progress import Report
from kveraser.training.stage import StageRun
from kveraser.training.store import LIMIT, Keeping

_TEXTS, _TEXT_TOKENS = 4, 256
_NOT_HIDDEN = (
    "eraser.hidden={hidden} has no effect: {model} makes keys and queries in one projection, or normalises them, so spans cannot be "
    "hidden by it. Training starts from a fresh LoRA (--set eraser.hidden=0 says so)"
)


def train_eraser(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    output: Path,
    *,
    stages: Sequence[StageName] = STAGES,
    start: Path | None = None,
    fresh: bool = False,
    accelerator: Accelerator | None = None,
    report: Report | None = None,
    store: Path | None = None,
    store_limit: int = LIMIT,
) -> KVEraser:
    """Train an eraser in the given stages. A run that was interrupted goes on from its last checkpoint.

    Args:
        model: the backbone; moved to the accelerator's device, otherwise left as it is.
        start: an eraser to start the first stage from (a folder or hub id); None takes the best of the stage before it in
            `output`, if there is one, else a new one.
        fresh: forget the checkpoints of these stages.
        report: called after every step, in the main process.
        store: a folder to keep what never changes of the lessons in, also for other runs; None keeps it in `output/lessons`
            where there are several epochs, and nothing where there are not.
        store_limit: bytes that it may have.

    Returns:
        The best eraser by validation KL, which is also in `output/eraser`.

    Raises:
        OptionError: no stage, a stage without tasks, one in chat form without a chat template, or a text that cannot be read.
        EraserMismatchError: see `first_eraser`.
        TrainingError: another run has the folder, or something is in it that no run has written and that would be replaced or
            removed; see also `StageRun`. Nothing was changed then, nor if it is of another run.
    """
    if not stages or any(not config.stage(name).tasks for name in stages):
        raise OptionError(f"stages={list(stages)}: needs at least one, each with at least one task")
    if any(config.stage(name).chat for name in stages):
        ChatForm(tokenizer)  # what is wrong with its template is said before anything is written
    if fresh and start is not None and (lost := _holding(start, [output / name for name in stages])):
        raise OptionError(f"start={start} is in {lost}, which fresh removes; give another output folder, or copy it")
    accelerator = accelerator or Accelerator()
    model.to(accelerator.device)  # type: ignore[arg-type]
    filler = read_filler(tokenizer, config.text)
    main = accelerator.is_main_process
    with held(output) if main else nullcontext():
        if main:
            for target in (*(output / name / BEST for name in STAGES), output / RESULT):
                recover(target)
            with saving(f"read {output}", "Nothing was trained"):
                check_own(output, stages, fresh=fresh)
        accelerator.wait_for_everyone()
        before = start or _stage_before(output, stages[0])
        eraser = first_eraser(model, tokenizer, filler, config, before)
        if main and fresh:
            for name in stages:
                _forget(output / name)
        accelerator.wait_for_everyone()
        for name in stages:
            if name != stages[0]:
                before = _stage_before(output, name)
                eraser = first_eraser(model, tokenizer, filler, config, before)
            folder = store or (output / "lessons" if config.stage(name).epochs > 1 else None)
            stage = StageRun(
                model, tokenizer, config, name, eraser, output / name, accelerator=accelerator, report=report,
                filler=filler, keeping=Keeping(folder, store_limit) if folder else None, given=before is not None,
            )  # fmt: skip
            if main:
                with saving(f"write {output / OPTIONS}"):
                    config.write(output / OPTIONS)
            stage.run()
            if main:
                _publish(output / name / BEST, output / RESULT)
            accelerator.wait_for_everyone()
    return KVEraser.from_pretrained(output / RESULT, model)


def _holding(path: Path, folders: Sequence[Path]) -> Path | None:
    """The first of the folders that a path is in."""
    inner = path.expanduser().resolve()
    return next((folder for folder in folders if inner.is_relative_to(folder.resolve())), None)


def _forget(folder: Path) -> None:
    if folder.exists():
        with saving(f"remove {folder}", "Nothing was trained"):
            shutil.rmtree(folder)


def _stage_before(output: Path, name: StageName) -> Path | None:
    index = STAGES.index(name)
    best = output / STAGES[index - 1] / BEST
    return best if index and best.exists() else None


def first_eraser(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, filler: Filler, config: TrainConfig, start: Path | None
) -> KVEraser:
    """What training starts from: an eraser that hides its spans, a fresh one where that is turned off, or a given one.

    Raises:
        EraserMismatchError: `start` is of another backbone, has no LoRA, or one that is not what the configuration says.
    """
    options = config.eraser
    eraser = KVEraser.new(
        model, rank=options.rank, alpha=options.alpha, window=options.window, repair=options.repair,
        acts_on=options.acts_on, values=options.values, seed=config.seed,
    )  # fmt: skip
    if start is not None:
        found = KVEraser.from_pretrained(start, model)
        _check_start(found, start, config)
        eraser.load_state_dict(found.state_dict(), str(start))
    elif options.hidden and eraser.steers_spans:
        rng, encode = random.Random(config.seed), encoder(tokenizer)
        texts = [encode(filler.text(rng, _TEXT_TOKENS, "train"))[:_TEXT_TOKENS] for _ in range(_TEXTS)]
        if not hide(eraser, model, texts, options.hidden):
            warnings.warn(_NOT_HIDDEN.format(hidden=options.hidden, model=type(model).__name__), stacklevel=2)
    return eraser


def _check_start(found: KVEraser, start: Path, config: TrainConfig) -> None:
    if found.lora_config is None:
        raise EraserMismatchError(f"the eraser in {start} is neutral: it has no weights to start from; leave start out")
    has = {
        "rank": found.lora_config.r, "alpha": found.lora_config.lora_alpha, "values": found.config.values,
        "acts_on": found.config.acts_on,
    }  # fmt: skip
    other = {key: (value, wanted) for key, value in has.items() if value != (wanted := getattr(config.eraser, key))}
    if other:
        said = ", ".join(f"{key} {value}, the configuration says {wanted}" for key, (value, wanted) in other.items())
        give = " ".join(f"--set eraser.{key}={value}" for key, (value, _) in other.items())
        raise EraserMismatchError(f"the eraser in {start} has {said}; give {give}")


def _publish(best: Path, target: Path) -> None:
    """Copy the best eraser to where the run's result is."""
    with saving(f"copy {best} to {target}"), replacing(target) as fresh:
        check_eraser(target)  # again: a run takes hours
        shutil.copytree(best, fresh)
