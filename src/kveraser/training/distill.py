"""From lessons to a loss: what the eraser's pass is judged by.

Knows: models, states as constants, the eraser. Does not know about optimisers or where lessons come from.

Notation of METHOD: the context is `P ++ S ++ X`. The frozen model prefills it once for all erases of a lesson. Then, for
all erases at once, the readers of `S` are computed again, as if `S` had never been there, and the eraser re-encodes `S` (with
gradients, from the window of `P` that it will see later), so that its keys and values stand in `S`'s slots. All probes are
judged in one forward, each attending to its context alone. The teacher does the same on `P ++ X`. Several lessons are packed
into the same forwards, since a short one alone cannot keep a processor busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kveraser.cache import Window, slots_of, window_spans
from kveraser.model.view import causal_lm
from kveraser.training.cases import Case, Prefilled
from kveraser.training.lessons import Probe, Weights
from kveraser.training.prepared import Prepared, target_states
from kveraser.training.rereading import Reread, reread
from kveraser.training.rows import Segment, States, places_of, run_row, slot_range


@dataclass(frozen=True)
class Judgement:
    """Logits over all target tokens of some lessons, `(tokens, vocab)`, and what is known of these tokens.

    Attributes:
        teacher, student: logits; gradients flow through the student's.
        targets: `(tokens,)` ids.
        gold: `(tokens,)` bool, targets of gold answers.
        probes: the probes that the targets belong to, in order.
    """

    teacher: Tensor
    student: Tensor
    targets: Tensor
    gold: Tensor
    probes: tuple[Probe, ...]

    def per_token(self, weights: Weights) -> Tensor:
        """`(tokens,)`: a weight for each target."""
        return torch.tensor(
            [weights[probe.kind] for probe in self.probes for _ in probe.targets], device=self.targets.device
        )


@dataclass(frozen=True)
class Variant:
    """Other ways to steer, for ablations; erasing itself does not offer them.

    Attributes:
        placeholder: an id to run in place of each of the span's own. An eraser that is as good without seeing what it
            erases has only learnt to be neutral.
        suffix_aware: the span also attends to the cached suffix, where it can see what it has left behind.
    """

    placeholder: int | None = None
    suffix_aware: bool = False


def judge(
    model: nn.Module,
    steering_model: nn.Module,
    prepared: Prepared,
    *,
    window: Window | None,
    variant: Variant = Variant(),
) -> Judgement:
    """Erase what the lessons say and compare what the model then says with the teacher.

    Args:
        model: the frozen backbone.
        steering_model: a view of it with the eraser attached.
        prepared: the lessons; where the eraser computes their readers, the spans are hidden and not steered.
        window: what of the context before them the spans attend to.
        variant: another way to steer.
    """
    cases = prepared.prefilled.cases
    if prepared.repairs is not None and prepared.learned:
        again = reread(steering_model, prepared.prefilled, cases, prepared.repairs)
        erased = _hidden(prepared.prefilled, cases, again)
    else:
        erased = _steered(steering_model, prepared, cases, window, variant)
    asked = [
        Segment.run(probe.ids, start, sees)
        for case, start, sees in zip(cases, erased.ends, erased.sees, strict=True)
        for probe in case.probes
    ]
    hidden, _ = run_row(model, asked, erased.past)
    probes = tuple(probe for case in cases for probe in case.probes)
    head = causal_lm(model).get_output_embeddings()
    with torch.no_grad():
        teacher = head(prepared.teacher)
    student = head(target_states(hidden, [place.end for place in places_of(asked)], probes))
    return Judgement(
        teacher,
        student,
        torch.tensor([token for probe in probes for token in probe.targets], device=student.device),
        torch.tensor([probe.gold for probe in probes for _ in probe.targets], device=student.device),
        probes,
    )


@dataclass(frozen=True)
class _Erased:
    """Cases after the erase.

    Attributes:
        past: pieces of states.
        sees: for each case, the slots of what is there now, `(n,)` int64.
        ends: for each case, the position of the next token.
    """

    past: list[States]
    sees: list[Tensor]
    ends: list[int]


def _hidden(prefilled: Prefilled, cases: Sequence[Case], again: Reread) -> _Erased:
    """Nothing is left of the spans, and no gap: neutral states are not seen."""
    sees, ends = [], []
    old, new = prefilled.slots, prefilled.slots + sum(map(len, again.behind))
    for case, behind, readers, gone in zip(cases, again.behind, again.readers, again.gone, strict=True):
        moved = slot_range(old, old + len(behind))
        moved[torch.isin(behind, readers)] = slot_range(new, new + len(readers))
        sees.append(torch.cat([case.slots[: case.erase.spans[0].start], moved]))
        ends.append(len(case.slots) - int(gone[-1]))
        old, new = old + len(behind), new + len(readers)
    return _Erased([prefilled.states, again.closed, again.states], sees, ends)


def _steered(
    steering_model: nn.Module, prepared: Prepared, cases: Sequence[Case], window: Window | None, variant: Variant
) -> _Erased:
    """Steering states in the spans' slots; nothing moves."""
    now = [case.slots.clone() for case in cases]  # the slots that hold the states of each case as they are by now
    past, slots = [prepared.prefilled.states], prepared.prefilled.slots
    if prepared.repairs is not None and prepared.repaired is not None:
        past.append(prepared.repaired)
        for own, repair in zip(now, prepared.repairs, strict=True):
            own[repair.slots] = slot_range(slots, slots + len(repair))
            slots += len(repair)
    groups = _alike(cases, prepared.repairs is not None)
    for index in range(max(len(case.erase.spans) for case in cases)):
        row = []  # from left to right: a span sees what is before it as it is by then
        for members in groups:
            case = cases[members[0]]
            if index >= len(case.erase.spans):
                continue
            span = case.erase.spans[index]
            seen = slots_of(window_spans(window, span.start), torch.device("cpu"))
            if variant.suffix_aware:
                seen = torch.cat([seen, slot_range(span.end, len(case.lesson.ids))])
            ids = case.lesson.ids[span.slice] if variant.placeholder is None else (variant.placeholder,) * len(span)
            row.append(Segment.run(ids, span.start, now[members[0]][seen]))
            for member in members:
                now[member][span.slice] = slot_range(slots, slots + len(span))
            slots += len(span)
        past.append(run_row(steering_model, row, past)[1])
    return _Erased(past, now, [len(case.slots) for case in cases])


def _alike(cases: Sequence[Case], reread: bool) -> list[list[int]]:
    """The cases in groups with the same steering states: those of the same erase, unless what was read again stands between
    its spans."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, case in enumerate(cases):
        apart = place if reread and len(case.erase.spans) > 1 else 0
        found.setdefault((case.number, apart), []).append(place)
    return list(found.values())
