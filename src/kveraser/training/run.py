"""A whole run: which stages, from what, into which folders.

Knows: erasers, folders. Does not know how a stage trains.

    OUTPUT/config.yaml
    OUTPUT/pretrain/   checkpoint.pt  best/  train.jsonl  tensorboard/
    OUTPUT/finetune/   the same, from the best of pretrain where there is one
    OUTPUT/eraser/     the best of the last stage that was run
    OUTPUT/lessons/    what never changes of the lessons, where there are several epochs and no other folder is given
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.eraser import KVEraser
from kveraser.errors import EraserMismatchError, OptionError
from kveraser.tasks import ChatForm, Filler
from kveraser.training.config import STAGES, StageName, TrainConfig
from kveraser.training.lessons import encoder, read_filler
from kveraser.training.neutral import hide
from kveraser.training.progress import Report
from kveraser.training.stage import StageRun
from kveraser.training.store import LIMIT, Keeping

_TEXTS, _TEXT_TOKENS = 4, 256


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
        start: an eraser to start the first stage from; None takes the best of the stage before it in `output`, if there
            is one, else a new one.
        fresh: forget the checkpoints of these stages.
        report: called after every step, in the main process.
        store: a folder to keep what never changes of the lessons in, also for other runs; None keeps it in `output/lessons`
            where there are several epochs, and nothing where there are not.
        store_limit: bytes that it may have.

    Returns:
        The best eraser by validation KL, which is also in `output/eraser`.

    Raises:
        OptionError: no stage, a stage without tasks, or one in chat form without a chat template.
        TrainingError: see `StageRun`.
    """
    if not stages or any(not config.stage(name).tasks for name in stages):
        raise OptionError(f"stages={list(stages)}: needs at least one, each with at least one task")
    if any(config.stage(name).chat for name in stages):
        ChatForm(tokenizer)  # what is wrong with its template is said before anything is written
    accelerator = accelerator or Accelerator()
    model.to(accelerator.device)  # type: ignore[arg-type]
    output.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        config.write(output / "config.yaml")
        if fresh:
            for name in stages:
                shutil.rmtree(output / name, ignore_errors=True)
    accelerator.wait_for_everyone()
    filler = read_filler(tokenizer, config.text)
    for name in stages:
        before = start if name == stages[0] and start is not None else _stage_before(output, name)
        eraser = first_eraser(model, tokenizer, filler, config, before)
        folder = store or (output / "lessons" if config.stage(name).epochs > 1 else None)
        StageRun(
            model, tokenizer, config, name, eraser, output / name, accelerator=accelerator, report=report, filler=filler,
            keeping=Keeping(folder, store_limit) if folder else None,
        ).run()  # fmt: skip
        if accelerator.is_main_process:
            _publish(output / name / "best", output / "eraser")
        accelerator.wait_for_everyone()
    return KVEraser.from_pretrained(output / "eraser", model)


def _stage_before(output: Path, name: StageName) -> Path | None:
    index = STAGES.index(name)
    best = output / STAGES[index - 1] / "best"
    return best if index and best.exists() else None


def first_eraser(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, filler: Filler, config: TrainConfig, start: Path | None
) -> KVEraser:
    """What training starts from: an eraser that hides its spans, a fresh one where that is turned off, or a given one.

    Raises:
        EraserMismatchError: `start` is of another backbone or rank, or its values are made in another way.
    """
    options = config.eraser
    eraser = KVEraser.new(
        model, rank=options.rank, alpha=options.alpha, window=options.window, repair=options.repair,
        acts_on=options.acts_on, values=options.values, seed=config.seed,
    )  # fmt: skip
    rng, encode = random.Random(config.seed), encoder(tokenizer)
    texts = [encode(filler.text(rng, _TEXT_TOKENS, "train"))[:_TEXT_TOKENS] for _ in range(_TEXTS)]
    if start is None and options.hidden and eraser.steers_spans:
        hide(eraser, model, texts, options.hidden)
    if start is not None:
        found = KVEraser.from_pretrained(start, model)
        rank = found.lora_config.r if found.lora_config else 0
        for key, has, wanted in (("rank", rank, options.rank), ("values", found.config.values, options.values)):
            if has != wanted:
                raise EraserMismatchError(
                    f"the eraser in {start} has {key} {has}, the configuration says {wanted}; give --set eraser.{key}={has}"
                )
        eraser.load_weights(start)
    return eraser


def _publish(best: Path, target: Path) -> None:
    """Copy the best eraser beside the old one, then exchange the two."""
    fresh = target.with_name(".eraser.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(best, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
