"""One stage of training: lessons, gradients, validation, checkpoints.

Knows: optimisers, processes (Accelerate), files. Does not know how a loss is made, or what the stages are for.

Any number of processes share the lessons of a step. The loss of a step is normalised by the weight of all its target
tokens over all processes, and gradients are summed; so the number of processes changes nothing but the order of a sum.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.eraser import KVEraser
from kveraser.errors import TrainingError
from kveraser.methods.choosing import SIGHT
from kveraser.model.attention import for_packing
from kveraser.model.view import model_dtype
from kveraser.readers import RULE, calibrate
from kveraser.tasks import ChatForm, Filler, as_task
from kveraser.training.card import write_card
from kveraser.training.checkpoint import Checkpoint, load_checkpoint
from kveraser.training.config import Stage, StageName, TrainConfig
from kveraser.training.distill import Judgement, Variant, judge
from kveraser.training.draws import Drawn, Draws, pack
from kveraser.training.folders import replacing, saving
from kveraser.training.lessons import LessonPlan, encoder, read_filler
from kveraser.training.losses import distillation_loss
from kveraser.training.prepared import prepare
from kveraser.training.progress import Progress, Report, Sums, Validation
from kveraser.training.rereading import Repairing
from kveraser.training.rows import pack_tokens
from kveraser.training.stage_log import StageLog
from kveraser.training.store import Keeping, LessonStore

_CALIBRATION_TOKENS = 2000
_SAMPLE = 16
"""Lessons by which the size of a store is told."""


class StageRun:
    """One stage of a run, from its checkpoint (if there is one) to its end.

    Args:
        model: the backbone, on the device that computes.
        eraser: trained in place; at the end it holds the best weights.
        folder: for `checkpoint.pt`, `best/`, `train.jsonl` and TensorBoard's files.
        filler: text around the spans; None reads the configuration's.
        keeping: where what never changes of the lessons is kept; None computes it every time.
        given: whether the eraser has the weights of another one, so that the run depends on these, too.
        variant: another way to steer, for ablations.

    Raises:
        TrainingError: the folder's checkpoint is of another run, cannot be read, or has lost its `best/`; the lessons that are
            kept are others, or have no room.
        OptionError: the text cannot be read, or is too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        name: StageName,
        eraser: KVEraser,
        folder: Path,
        *,
        accelerator: Accelerator | None = None,
        report: Report | None = None,
        filler: Filler | None = None,
        keeping: Keeping | None = None,
        given: bool = False,
        variant: Variant = Variant(),  # noqa: B008
    ) -> None:
        self.variant = variant
        self.name, self.config, self.stage, self.folder = name, config, config.stage(name), folder
        self.accelerator = accelerator or Accelerator()
        self.report = report
        encode, text = encoder(tokenizer), filler or read_filler(tokenizer, config.text)
        plan = _lesson_plan(self.stage, tokenizer)
        self.draws = Draws(config.seed, name, self.stage, config.eraser.repair, plan, text, encode)
        self.backbone = for_packing(model)
        self.store = LessonStore(keeping, self.backbone, name, self.stage, config.seed) if keeping else None
        reads = bool(eraser.repair or any(self.stage.repair))
        if eraser.calibration is None and reads:
            eraser.calibration = self.store.calibration(None) if self.store else None
        if eraser.calibration is None and reads:
            words = encode(text.text(random.Random(config.seed), _CALIBRATION_TOKENS, "train"))
            made = calibrate(model, words[:_CALIBRATION_TOKENS])
            eraser.calibration = self.store.calibration(made) if self.store else made
        self.most = pack_tokens(self.accelerator.device)
        self.eraser = eraser.train()
        self.eraser.to(self.accelerator.device, torch.float32)
        self.parameters = eraser.parameters()
        self.steering = eraser.attached(self.backbone)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.stage.learning_rate, weight_decay=self.stage.weight_decay
        )
        self.mean = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.best, self.waited = 0, math.inf, 0
        self.run_id = _run_id(config, name, eraser, model, text, given=given, reads=reads)
        if (state := load_checkpoint(folder, self.run_id)) is not None:
            if not (folder / "best").exists():
                raise TrainingError(f"{folder} has a checkpoint, but its best/ is gone; start anew with --fresh")
            self._restore(state)
        self.held_out = self.draws.held_out(self._own(self.stage.validation_contexts))
        if self.store and self.step < self.stage.steps:
            sample = self.draws.of_step(0, range(min(_SAMPLE, self.draws.size)))
            count = self.draws.size + self.stage.validation_contexts
            self.store.check_room(sample, count, eraser.steers_readers)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Validation | None:
        """Train to the end of the stage, or until patience runs out; returns the last validation."""
        with saving(f"write to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        log = StageLog(self.folder, self.step) if self.accelerator.is_main_process else None
        clock, spans, validation = time.perf_counter(), 0, None
        try:
            if self.step == 0:
                validation = self._validate_and_keep()
                self._tell(log, Sums(), validation, 0.0)
            elif self._over and log:  # in an earlier call
                self._report(Sums(), None, 0.0)
            while not self._over:
                sums = self.train_step()
                spans += sums.spans
                last = self.step == self.stage.steps
                validation = None
                if self.step % self.stage.validate_every == 0 or last:
                    validation = self._validate_and_keep()
                if validation or self.step % self.stage.checkpoint_every == 0:
                    self._save_state()
                self._tell(log, sums, validation, spans / (time.perf_counter() - clock))
        finally:
            if log:
                log.close()
        self.eraser.load_weights(self.folder / "best")
        return validation

    @property
    def _over(self) -> bool:
        return self.step >= self.stage.steps or 0 < self.stage.patience <= self.waited

    def _own(self, count: int) -> range:
        """The indices that this process takes of so many."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def _judge(self, group: Sequence[Drawn]) -> Judgement:
        repairing = None
        if group[0].repair:
            repairing = Repairing(group[0].repair, self.eraser.calibration, self.eraser.steers_readers)
        if self.store:
            prepared = self.store.prepared(group, repairing)
        else:
            prepared = prepare(self.backbone, [one.lesson for one in group], repairing)
        return judge(self.backbone, self.steering, prepared, window=self.eraser.window, variant=self.variant)

    def train_step(self) -> Sums:
        """Learn from the lessons of the next step.

        Raises:
            TrainingError: the loss or its gradient is no number; the weights are as they were.
        """
        for options in self.optimizer.param_groups:
            options["lr"] = self.stage.learning_rate * _schedule(self.step, self.stage)
        drawn = self.draws.of_step(self.step, self._own(self.stage.contexts))
        weights = [
            self.stage.weights[probe.kind] for one in drawn for probe in one.lesson.probes for _ in probe.targets
        ]
        weight = torch.tensor(sum(weights), dtype=torch.float32, device=self.accelerator.device)  # of no lesson, too
        total = self.accelerator.reduce(weight, "sum")
        sums = Sums()
        for group in pack(drawn, self.most):
            judged = self._judge(group)
            terms = distillation_loss(
                judged.teacher, judged.student, judged.targets, judged.gold, self.stage.cross_entropy
            )
            loss = (terms * judged.per_token(self.stage.weights)).sum() / total
            loss.backward()
            sums.add([one.lesson for one in group], judged, loss.item())
        sums = sums.over_all(self.accelerator)
        if not math.isfinite(sums.loss):
            raise self._broken(f"the loss became {sums.loss}")
        self._add_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.stage.clip).item()
        if not math.isfinite(norm):  # the loss may well be a number: one step, and no weight would be one
            self.optimizer.zero_grad()
            raise self._broken(f"the gradient's norm became {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.stage.average, self.step / (self.step + 10))
        for value, parameter in zip(self.mean, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)
        return sums

    def _broken(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.step + 1} of {self.name}; the last checkpoint and {self.folder / 'best'} are intact. "
            f"Lower {self.name}.learning_rate={self.stage.learning_rate}"
        )

    def _add_gradients(self) -> None:
        """Sum the gradients of all processes, in one exchange."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = self.accelerator.reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "sum")
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    # -- validation and files ------------------------------------------------------------------------------------

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running mean of the weights in place of the current ones."""
        current = [parameter.data for parameter in self.parameters]
        for parameter, value in zip(self.parameters, self.mean, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, current, strict=True):
                parameter.data = value

    @torch.no_grad()
    def _validate(self) -> Validation:
        sums = Sums()
        for group in pack(self.held_out, self.most):
            sums.add([one.lesson for one in group], self._judge(group))
        return sums.over_all(self.accelerator).validation

    def _validate_and_keep(self) -> Validation:
        """Validate the mean of the weights, and keep it when it is the best so far."""
        with self._averaged():
            validation = self._validate()
            if validation.mean < self.best:
                self.best, self.waited = validation.mean, 0
                if self.accelerator.is_main_process:
                    self._save_best(validation)
            else:
                self.waited += 1
        self.accelerator.wait_for_everyone()
        return validation

    def _save_best(self, validation: Validation) -> None:
        best = self.folder / "best"
        kl = {"query_after": validation.after, "query_cached": validation.cached}
        notes = {
            "training": _without_paths(self.config), "stage": self.name, "step": self.step,
            "validation_kl": {asked: None if math.isnan(value) else value for asked, value in kl.items()},
        }  # fmt: skip
        then = "The one before it is still there"
        with saving(f"save the eraser to {best} at step {self.step}", then), replacing(best) as fresh:
            self.eraser.save_pretrained(fresh, notes=notes)
            write_card(fresh, notes)

    def _save_state(self) -> None:
        if self.accelerator.is_main_process:
            weights = [parameter.detach() for parameter in self.parameters]
            optimizer = self.optimizer.state_dict()
            Checkpoint(self.run_id, self.step, weights, self.mean, optimizer, self.best, self.waited).save(self.folder)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: Checkpoint) -> None:
        self.step, self.best, self.waited = state.step, state.best, state.waited
        with torch.no_grad():
            for own, saved in zip((*self.parameters, *self.mean), (*state.weights, *state.mean), strict=True):
                own.copy_(saved)
        self.optimizer.load_state_dict(state.optimizer)

    def _tell(self, log: StageLog | None, sums: Sums, validation: Validation | None, speed: float) -> None:
        if log:
            train = sums.validation
            entry = {
                "step": self.step,
                "loss": sums.loss,
                "kl": sums.kl,
                "exact_match": sums.exact_match,
                "best": self.best,
            }
            entry |= {"kl_after": train.after, "kl_cached": train.cached}
            if validation:
                entry |= {"validation_kl_after": validation.after, "validation_kl_cached": validation.cached}
            log.write(entry)
            self._report(sums, validation, speed)

    def _report(self, sums: Sums, validation: Validation | None, speed: float) -> None:
        if self.report:
            self.report(
                Progress(
                    self.name,
                    self.step,
                    self.stage.steps,
                    sums.loss,
                    sums.kl,
                    sums.exact_match,
                    validation,
                    self.best,
                    speed,
                )
            )


def _lesson_plan(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> LessonPlan:
    return LessonPlan(
        tuple(as_task(name) for name in stage.tasks), stage.tokens, stage.spacing, stage.spans, stage.together,
        stage.weights, ChatForm(tokenizer) if stage.chat else None,
    )  # fmt: skip


def _schedule(step: int, stage: Stage) -> float:
    """A linear rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / stage.warmup) if stage.warmup else 1.0
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / stage.steps))


def _without_paths(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it may be published: of the text only its name."""
    plain = config.as_dict()
    if config.text and not config.text.startswith("hf:"):
        plain["text"] = Path(config.text).name
    return plain


def _run_id(
    config: TrainConfig, name: StageName, eraser: KVEraser, model: nn.Module, text: Filler, *, given: bool, reads: bool
) -> dict[str, Any]:
    """What a stage depends on, as a checkpoint keeps it.

    Args:
        given: the eraser has the weights of another one.
        reads: readers are recomputed, so that it depends on how they are chosen, too.
    """
    plain = config.as_dict()
    return {
        "stage": name, name: plain[name], "eraser": plain["eraser"], "text": plain["text"], "seed": plain["seed"],
        "backbone": eraser.config.fingerprint.in_short, "dtype": str(model_dtype(model)),
        "text_sha256": text.sha256[:12],
        **({"readers": RULE, "seen": SIGHT} if reads else {}),
        **({"start": _digest(eraser)} if given else {}),
    }  # fmt: skip


def _digest(eraser: KVEraser) -> str:
    total = hashlib.sha256()
    for weight in eraser.state_dict().values():
        total.update(weight.float().numpy().tobytes())
    return total.hexdigest()[:12]
