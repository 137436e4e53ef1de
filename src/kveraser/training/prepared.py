"""What of lessons never changes while an eraser trains: the states of their contexts, the teacher, and the readers.

Knows: the frozen model, packed rows. Does not know about losses, or where it is kept (`store.py`).

Lessons can be prepared together in few forwards, or one by one and joined; both are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kveraser.cache import Repair
from kveraser.model.view import model_device
from kveraser.spans import gaps
from kveraser.training.cases import Prefilled, prefill
from kveraser.training.lessons import Lesson, Probe
from kveraser.training.rereading import Repairing, repair_of, reread
from kveraser.training.rows import Segment, States, pack_tokens, places_of, run_row, slot_range


@dataclass(frozen=True)
class Prepared:
    """Lessons, ready to be learnt from.

    Attributes:
        prefilled: with the states of their contexts.
        teacher: last hidden states of full recomputation at all target tokens, `(tokens, hidden)`, case by case.
        repairs: for each case, which readers are computed again and what these see; None where none are.
        repaired: their states, case by case; None where there are none, or the eraser computes them.
    """

    prefilled: Prefilled
    teacher: Tensor
    repairs: tuple[Repair, ...] | None = None
    repaired: States | None = None

    @property
    def learned(self) -> bool:
        """Whether the eraser computes the readers, and the spans are hidden and not steered."""
        return self.repairs is not None and self.repaired is None


def prepare(model: nn.Module, lessons: Sequence[Lesson], repairing: Repairing | None = None) -> Prepared:
    """Run the lessons through the frozen model, and the teacher; choose the readers, and compute them where it is for the
    frozen model to do so.

    Args:
        repairing: which readers are computed again, and by whom; None for none.
    """
    prefilled = prefill(model, lessons)
    prepared = Prepared(prefilled, teach(model, prefilled))
    if repairing is None:
        return prepared
    repairs = choose(model, prefilled, repairing)
    return replace(prepared, repairs=repairs, repaired=None if repairing.learned else repair(model, prefilled, repairs))


def choose(model: nn.Module, prefilled: Prefilled, repairing: Repairing) -> tuple[Repair, ...]:
    """The readers of every case."""
    return tuple(repair_of(model, prefilled, case, repairing) for case in prefilled.cases)


@torch.no_grad()
def repair(model: nn.Module, prefilled: Prefilled, repairs: Sequence[Repair]) -> States:
    """The states that the frozen model gives the readers, case by case."""
    return reread(model, prefilled, prefilled.cases, repairs).opened(model)


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Lessons that were prepared one by one, as if together; all with readers that are computed again, or none."""
    if len(parts) == 1:
        return parts[0]
    lessons = [lesson for part in parts for lesson in part.prefilled.lessons]
    prefilled = Prefilled.of(lessons, joined_states([part.prefilled.states for part in parts]))
    teacher = torch.cat([part.teacher for part in parts])
    if any(part.repairs is None for part in parts):
        return Prepared(prefilled, teacher)
    repairs = tuple(each for part in parts for each in part.repairs or ())
    repaired = [part.repaired for part in parts if part.repaired is not None]
    return Prepared(prefilled, teacher, repairs, joined_states(repaired) if repaired else None)


def joined_states(parts: Sequence[States]) -> States:
    """States one behind the other."""
    return [
        (torch.cat([keys for keys, _ in layer], -2), torch.cat([values for _, values in layer], -2))
        for layer in zip(*parts, strict=True)
    ]


def whole(lesson: Lesson, probe: Probe) -> Probe:
    """The probe with its question, as one that is asked when nothing stands behind the context."""
    if probe.cached is None:
        return Probe(probe.ids, probe.targets)
    return Probe((*lesson.questions[probe.cached][:-1], *probe.ids), probe.targets)


def target_states(hidden: Tensor, ends: Sequence[int], probes: Sequence[Probe]) -> Tensor:
    """Last hidden states where the targets of probes are told that end at these places of a row."""
    return torch.cat([hidden[end - len(probe.targets) : end] for end, probe in zip(ends, probes, strict=True)])


@torch.no_grad()
def teach(model: nn.Module, prefilled: Prefilled) -> Tensor:
    """Last hidden states of full recomputation at all target tokens of the lessons, `(tokens, hidden)`, case by case."""
    most, slots = pack_tokens(model_device(model)), prefilled.slots
    row: list[Segment] = []
    waiting: list[tuple[int, Probe, int]] = []  # erase, probe, where in the row its segment is
    answers: dict[tuple[int, Probe], Tensor] = {}

    def run() -> None:
        hidden, _ = run_row(model, row, [prefilled.states])
        places = places_of(row)
        probes = [probe for _, probe, _ in waiting]
        found = target_states(hidden, [places[index].end for _, _, index in waiting], probes)
        parts = found.split([len(probe.targets) for probe in probes])
        answers.update({(number, probe): part for (number, probe, _), part in zip(waiting, parts, strict=True)})
        row.clear()
        waiting.clear()

    for number, (index, erase) in enumerate(prefilled.erases):
        lesson, context = prefilled.lessons[index], prefilled.context[index]
        start = erase.spans[0].start
        rest = [token for kept in gaps(erase.spans, len(lesson.ids), start) for token in lesson.ids[kept.slice]]
        tokens = sum(map(len, row))
        if row and tokens + len(rest) > most:
            run()
            tokens = 0
        seen = slot_range(context.start, context.start + start)
        if rest:
            row.append(Segment.run(rest, start, seen))
            seen = torch.cat([seen, slot_range(slots + tokens, slots + tokens + len(rest))])
        for probe in dict.fromkeys(whole(lesson, probe) for probe in erase.probes):  # one answer in both protocols
            waiting.append((number, probe, len(row)))
            row.append(Segment.run(probe.ids, start + len(rest), seen))
    run()
    return torch.cat(
        [answers[case.number, whole(case.lesson, probe)] for case in prefilled.cases for probe in case.probes]
    )
