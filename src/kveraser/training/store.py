"""The lesson store: what never changes of lessons is computed once and then read from disk, epoch after epoch.

Knows: prepared lessons, which pieces they are kept in. Does not know about erasers, or how pieces are written.

    SPLIT-NUMBER-states         the states of a context and its questions, and the teacher's last hidden states
    SPLIT-NUMBER-readers-64     which readers of each span an erase would recompute, and what these see
    SPLIT-NUMBER-repaired-64    their states, where it is for the frozen model to compute them

Nothing of it depends on the eraser: runs that differ in rank, window, batch or learning rate share a store. Every lesson is
prepared alone, so that it has the same bits whenever that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kveraser.cache import Repair
from kveraser.errors import CalibrationError, TrainingError
from kveraser.files import digest_json
from kveraser.methods.choosing import SIGHT
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import kv_shape, model_device, model_dtype
from kveraser.readers import FILE_NAME, RULE, Calibration, read_calibration, write_calibration
from kveraser.training.cases import Prefilled, prefill
from kveraser.training.config import Stage, StageName
from kveraser.training.draws import Drawn
from kveraser.training.lessons import Lesson
from kveraser.training.pieces import Pieces
from kveraser.training.prepared import Prepared, choose, joined, repair, teach
from kveraser.training.rereading import Repairing
from kveraser.training.rows import States

LIMIT = 20_000_000_000
"""Bytes that a store may have."""
_LESSON_KEYS = ("tasks", "tokens", "spacing", "spans", "together", "chat")


@dataclass(frozen=True)
class Keeping:
    """Where lessons are kept.

    Attributes:
        folder: for all stages.
        limit: bytes that it may have.
    """

    folder: Path
    limit: int = LIMIT


class LessonStore:
    """The lessons of one stage on one backbone.

    Args:
        model: the frozen backbone that prepares them.
        stage: what they are like.
        seed: what they are drawn by.

    Raises:
        TrainingError: the folder holds lessons of another backbone, stage, seed or plan, or cannot be written.
    """

    def __init__(self, keeping: Keeping, model: nn.Module, name: StageName, stage: Stage, seed: int) -> None:
        self.model = model
        self.about = _about(model, name, stage, seed)
        self.pieces = Pieces(keeping.folder / name, self.about, keeping.limit, keeping.folder)

    def calibration(self, made: Calibration | None) -> Calibration | None:
        """What tells readers, as it was when the first of them were chosen.

        Args:
            made: kept if there is none yet; None only asks for the one that is there.
        """
        file = self.pieces.folder / FILE_NAME
        try:
            if not file.exists():
                if made is None or made.scan is None:
                    return made
                write_calibration(file, made)
            return read_calibration(file)
        except CalibrationError as error:
            raise TrainingError(
                f"{error}; delete the folder {file.parent}, and the same command computes it again"
            ) from error
        except OSError as error:
            raise TrainingError(f"cannot keep lessons in {file.parent}: {error}") from error

    def check_room(self, sample: Sequence[Drawn], count: int, learned: bool) -> None:
        """Raise `TrainingError` unless so many lessons like those of the sample fit.

        Args:
            learned: whether the eraser computes the readers, so that their states are not kept.
        """
        layers, heads, width = kv_shape(self.model)
        slots = sum(_slots(one.lesson) + (0 if learned else _most_repaired(one)) for one in sample)
        per_slot = 2 * layers * heads * width * torch.empty((), dtype=model_dtype(self.model)).element_size()
        self.pieces.check_room(count * slots * per_slot // len(sample), f"keeping {count} contexts")

    def prepared(self, group: Sequence[Drawn], repairing: Repairing | None) -> Prepared:
        """Lessons, ready to be learnt from; computed only if they are not there yet."""
        device = model_device(self.model)
        return joined([self._one(one, repairing, device) for one in group])

    def _one(self, one: Drawn, repairing: Repairing | None, device: torch.device) -> Prepared:
        name, of = f"{one.split}-{one.number:06d}", digest_json([self.about, asdict(one.lesson)])

        def states() -> dict[str, Tensor]:
            made = prefill(self.model, [one.lesson])
            return {**_named(made.states), "teacher": teach(self.model, made)}

        found = self.pieces.get(f"{name}-states", of, states)
        prefilled = Prefilled.of([one.lesson], _states(found, device))
        teacher = found["teacher"].to(device)
        if repairing is None:
            return Prepared(prefilled, teacher)

        def readers() -> dict[str, Tensor]:
            return _named_repairs(choose(self.model, prefilled, repairing))

        kept = self.pieces.get(f"{name}-readers-{repairing.tokens}", of, readers)
        repairs = _repairs(kept, prefilled)
        if repairing.learned:
            return Prepared(prefilled, teacher, repairs)

        def repaired() -> dict[str, Tensor]:
            return _named(repair(self.model, prefilled, repairs))

        again = self.pieces.get(f"{name}-repaired-{repairing.tokens}", of, repaired)
        return Prepared(prefilled, teacher, repairs, _states(again, device))


def _about(model: nn.Module, name: StageName, stage: Stage, seed: int) -> dict[str, Any]:
    """What lessons and their states depend on, but for the text, which each lesson's digest tells."""
    options = asdict(stage)
    return {
        "backbone": Fingerprint.of(model).in_short, "dtype": str(model_dtype(model)), "stage": name,
        "seed": seed, **{key: options[key] for key in _LESSON_KEYS},
        "readers": RULE, "seen": SIGHT, "asked": sorted(kind for kind, weight in stage.weights.items() if weight),
    }  # fmt: skip


def _slots(lesson: Lesson) -> int:
    return len(lesson.ids) + sum(len(question) - 1 for question in lesson.questions)


def _most_repaired(one: Drawn) -> int:
    """Readers of all cases of a lesson, at most."""
    return sum(
        min(one.repair * len(erase.spans), len(one.lesson.ids) - erase.spans[0].start) * len(erase.moments)
        for erase in one.lesson.erases
    )


def _named(states: States) -> dict[str, Tensor]:
    return {
        f"{what}{index}": part for index, layer in enumerate(states) for what, part in zip("kv", layer, strict=True)
    }


def _states(tensors: dict[str, Tensor], device: torch.device) -> States:
    layers = sum(key[0] == "k" for key in tensors)
    return [(tensors[f"k{index}"].to(device), tensors[f"v{index}"].to(device)) for index in range(layers)]


def _named_repairs(repairs: Sequence[Repair]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, each in enumerate(repairs):
        found |= {f"slots{number}": each.slots, f"sees{number}": each.sees}
        if each.stand_for is not None:
            found[f"stand_for{number}"] = each.stand_for
    return found


def _repairs(tensors: dict[str, Tensor], prefilled: Prefilled) -> tuple[Repair, ...]:
    return tuple(
        Repair(tensors[f"slots{number}"], tensors[f"sees{number}"], case.erase.spans, tensors.get(f"stand_for{number}"))
        for number, case in enumerate(prefilled.cases)
    )
