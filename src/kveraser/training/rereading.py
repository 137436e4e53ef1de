"""What erasing recomputes in a lesson: the readers of a span, chosen and computed as an erase does it.

Knows: choosing, packed rows, rotary positions. Does not know about losses.

A reader is computed as if no gap were before it. An erase turns its queries for that and rounds no key; here, in float32, the
keys behind the first span are moved up in a copy, the readers run at the positions they would have, and their own keys are
moved back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.cache import Marks, Repair, Tokens, TransformersBackend, can_close_gaps
from kveraser.eraser import default_eraser
from kveraser.methods.base import Edit
from kveraser.methods.choosing import Wish, choose_readers
from kveraser.model.rope import Rotation, frequencies, rotary_layout
from kveraser.model.view import model_device
from kveraser.readers import Calibration
from kveraser.training.cases import Case, Prefilled
from kveraser.training.rows import Segment, States, run_row, slot_range


@dataclass(frozen=True)
class Repairing:
    """How erasing recomputes readers.

    Attributes:
        tokens: readers per span.
        calibration: what tells them; None makes one from the lesson's own tokens.
        learned: whether the eraser computes them, with gradients; else the frozen model.
        keys: how many slots each is shown at least, as of `Steering`.
    """

    tokens: int
    calibration: Calibration | None = None
    learned: bool = False
    keys: int | None = 512


@dataclass(frozen=True)
class Reread:
    """Cases with their readers computed again, all keys as if there were no gap.

    Attributes:
        closed: states of the other tokens behind the first span of each case, one case behind the other.
        states: states of the readers.
        behind: for each case, where these other tokens (and the readers, in their old state) are among its own, `(n,)` int64.
        readers: for each case, where its readers are.
        gone: for each case, how many erased tokens are before each of its own, `(tokens,)` int64; zeros where gaps cannot be
            closed.
    """

    closed: States
    states: States
    behind: list[Tensor]
    readers: list[Tensor]
    gone: list[Tensor]

    def opened(self, model: nn.Module) -> States:
        """The readers' states with their keys where the tokens are."""
        steps = [gone[chosen] for gone, chosen in zip(self.gone, self.readers, strict=True)]
        return _moved(model, self.states, torch.cat(steps))


def reread(model: nn.Module, prefilled: Prefilled, cases: Sequence[Case], repairs: Sequence[Repair]) -> Reread:
    """Compute the readers of every case, all in one forward.

    Args:
        model: the frozen model, or a view of it with the eraser attached, which then gets gradients.
        repairs: of each case, from `repair_of`.
    """
    readers = [repair.slots for repair in repairs]
    with torch.no_grad():
        closes = can_close_gaps(model)
        gone = [_gone_before(case) * closes for case in cases]
        behind = [_kept_behind(case) for case in cases]
        closed = _moved(
            model,
            _picked(prefilled.states, torch.cat([case.slots[at] for case, at in zip(cases, behind, strict=True)])),
            torch.cat([-each[at] for each, at in zip(gone, behind, strict=True)]),
        )
        row, start = [], prefilled.slots
        for case, repair, rest, ahead in zip(cases, repairs, behind, gone, strict=True):
            first, chosen = case.erase.spans[0].start, repair.slots
            slots = torch.cat([case.slots[:first], slot_range(start, start + len(rest))])
            places = torch.cat([torch.arange(first), rest])
            start += len(rest)
            if len(chosen):
                shown = torch.isin(places, repair.sees) & ~torch.isin(places, chosen)
                sees, places = slots[shown], places[shown]
                stand_for = None
                if repair.stand_for is not None:
                    stand_for = repair.stand_for[torch.searchsorted(repair.sees, places)]
                earlier = places[None] < chosen[:, None]
                ids, positions = case.ids[chosen].tolist(), (chosen - ahead[chosen]).tolist()
                row.append(Segment(ids, positions, sees, earlier, stand_for))
    if not row:
        return Reread(closed, _picked(prefilled.states, slot_range(0, 0)), behind, readers, gone)
    return Reread(closed, run_row(model, row, [prefilled.states, closed])[1], behind, readers, gone)


@torch.no_grad()
def repair_of(model: nn.Module, prefilled: Prefilled, case: Case, repairing: Repairing) -> Repair:
    """What an erase would recompute of a case's tokens and let these see, on the CPU; slots are places in `case.slots`."""
    device = model_device(model)
    layers = []
    for keys, values in _picked(prefilled.states, case.slots):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    tokens = Tokens(case.ids[None].to(device))
    backend = TransformersBackend(model, Cache(layers=layers))
    edit = Edit(backend, tokens, case.erase.spans, Marks(), lambda: default_eraser(model))
    choice = choose_readers(edit, Wish(repairing.tokens, keys=repairing.keys), repairing.calibration)
    if choice is None:
        return Repair(slot_range(0, 0), slot_range(0, 0), case.erase.spans)
    found = choice.repair(case.erase.spans)
    weights = found.stand_for
    return Repair(found.slots.cpu(), found.sees.cpu(), found.absent, None if weights is None else weights.float().cpu())


def _stays(case: Case) -> Tensor:
    """`(n,)` bool: which of the tokens are not erased."""
    stays = torch.ones(len(case.slots), dtype=torch.bool)
    for span in case.erase.spans:
        stays[span.slice] = False
    return stays


def _kept_behind(case: Case) -> Tensor:
    """Where the tokens behind the first span are that are not erased, `(n,)` int64."""
    places = _stays(case).nonzero()[:, 0]
    return places[places >= case.erase.spans[0].start]


def _gone_before(case: Case) -> Tensor:
    """`(n,)` int64: how many erased tokens are before each."""
    return (~_stays(case)).long().cumsum(0)


def _picked(states: States, slots: Tensor) -> States:
    """The states of some slots."""
    index = slots.to(states[0][0].device)
    return [(keys.index_select(2, index), values.index_select(2, index)) for keys, values in states]


def _moved(model: nn.Module, states: States, steps: Tensor) -> States:
    """States with their keys moved by so many positions each."""
    if not bool(steps.any()):
        return states
    layout = rotary_layout(model)
    turn = Rotation(steps[None], frequencies(model), layout.pairing)
    return [
        (turn(keys) if rotary else keys, values) for rotary, (keys, values) in zip(layout.rotary, states, strict=True)
    ]
