"""What is said of a run: sums over lessons, validations, progress.

Knows: judgements, processes (to add up). Does not know who listens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from kveraser.evaluation.metrics import kl_divergence
from kveraser.training.config import StageName
from kveraser.training.distill import Judgement
from kveraser.training.lessons import Lesson


@dataclass(frozen=True)
class Validation:
    """Mean KL on held-out lessons, in nats per answer token, asked after the erase and with the question cached; nan where that
    is not asked."""

    after: float
    cached: float

    @property
    def mean(self) -> float:
        """What the best eraser is chosen by."""
        asked = [kl for kl in (self.after, self.cached) if not math.isnan(kl)]
        return sum(asked) / len(asked) if asked else math.nan


@dataclass(frozen=True)
class Progress:
    """Where a stage is.

    Attributes:
        step, steps: optimiser steps.
        loss: of this step.
        kl: its KL on the spans' own questions.
        exact_match: share of its gold answers that the erased model would give (teacher-forced).
        validation: when there was one after this step.
        best: lowest mean KL of a validation so far.
        spans_per_second: erases that were learnt from, per second, in this call.
    """

    stage: StageName
    step: int
    steps: int
    loss: float
    kl: float
    exact_match: float
    validation: Validation | None
    best: float
    spans_per_second: float


Report = Callable[[Progress], None]


@dataclass
class Sums:
    """Additive results of some lessons; processes add theirs up."""

    loss: float = 0.0
    after: float = 0.0
    after_tokens: int = 0
    cached: float = 0.0
    cached_tokens: int = 0
    matched: int = 0
    golds: int = 0
    spans: int = 0

    def add(self, lessons: Sequence[Lesson], judged: Judgement, loss: float = 0.0) -> None:
        """Add what was judged of some lessons, and the loss they gave."""
        kl = kl_divergence(judged.teacher, judged.student.detach()).cpu()  # looked at probe by probe
        self.loss += loss
        self.spans += sum(len(erase.spans) for lesson in lessons for erase in lesson.erases)
        right = (judged.student.argmax(-1) == judged.targets).cpu()
        at = 0
        for probe in judged.probes:
            own = slice(at, at + len(probe.targets))
            at = own.stop
            if probe.kind == "query_after":
                self.after += float(kl[own].sum())
                self.after_tokens += len(probe.targets)
                self.golds += probe.gold
                self.matched += int(probe.gold and bool(right[own].all()))
            elif probe.kind == "query_cached":
                self.cached += float(kl[own].sum())
                self.cached_tokens += len(probe.targets)

    def over_all(self, accelerator: Accelerator) -> Sums:
        """The sums over all processes."""
        values = torch.tensor([float(value) for value in vars(self).values()], dtype=torch.float64)
        if accelerator.device.type != "mps":
            values = values.to(accelerator.device)
        return Sums(*accelerator.reduce(values, "sum").tolist())

    @property
    def kl(self) -> float:
        """Mean KL per answer token in both protocols; nan where nothing was asked."""
        tokens = self.after_tokens + self.cached_tokens
        return (self.after + self.cached) / tokens if tokens else math.nan

    @property
    def exact_match(self) -> float:
        """Share of the gold answers that the erased model would give; nan where there are none."""
        return self.matched / self.golds if self.golds else math.nan

    @property
    def validation(self) -> Validation:
        """Mean KL per answer token."""

        def mean(total: float, tokens: int) -> float:
            return total / tokens if tokens else math.nan

        return Validation(mean(self.after, self.after_tokens), mean(self.cached, self.cached_tokens))
