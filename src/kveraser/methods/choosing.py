"""Choosing the tokens that an edit recomputes: those that have read the spans, or those that come next.

Knows: edits, calibrations, scores. Does not know what is done with the chosen ones, or how scores are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kveraser.cache import Can, slots_of
from kveraser.errors import CalibrationError, OptionError, UnsupportedCacheError
from kveraser.methods.base import Edit
from kveraser.methods.choice import Choice
from kveraser.methods.slots import with_slots
from kveraser.readers import (
    HOW_MANY,
    LEAST_READERS,
    RULE,
    Calibration,
    Scene,
    calibration_for,
    choose,
    first_behind,
    readers_for,
    residual,
    source_of,
    weights_of,
)

CANDIDATES = 256
CLOSER = 8
"""At least so many tokens get the close look, and eight times as many as are to be recomputed."""
NEAREST = 32
"""Slots right before a chosen token that it sees in any case."""
SINK = 4
ALL = 6
"""Where it is at most six times as many slots as were asked for each, every chosen token sees everything."""
RUN = 16
"""Tokens of a run, where nothing but runs can be computed."""
SHARED, SAMPLED = 3, 1
"""Else all of them see three times as many as were asked for each, which any of them needs, and once as many drawn evenly from
the others, each for as many as it was drawn from: the many small weights of a softmax are together not small."""

SIGHT = (
    f"a close look at {CLOSER} for each, {CANDIDATES} at least; seen: all up to {ALL} times the keys, else the first {SINK}, "
    f"{NEAREST} before each, {SHARED} times shared, {SAMPLED} times sampled"
)
"""How readers are looked at and what they see."""
CHOSEN = f"{HOW_MANY}; {RULE}; {SIGHT}"
"""How readers are chosen where nobody says otherwise; what was chosen otherwise must not be taken for it."""


@dataclass(frozen=True)
class Wish:
    """What a user asks of a choice; `repair` counts tokens per span, None: by its length (`readers.how_many`).

    Raises:
        OptionError: an impossible value.
    """

    repair: int | None = None
    coverage: float | None = None
    block: int | None = None
    keys: int | None = 512

    def __post_init__(self) -> None:
        if self.repair is not None and self.repair < 0:
            raise OptionError(f"repair={self.repair} must be at least 0 tokens")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise OptionError(f"coverage={self.coverage} must be above 0 and at most 1 (a share of the attention)")
        if self.block is not None and self.block < 1:
            raise OptionError(f"block={self.block} must be at least 1 slot")
        least = LEAST_READERS if self.repair is None else self.repair
        if self.block is not None and 0 < least < self.block:
            raise OptionError(f"block={self.block} is more than the repair={least} tokens that may be recomputed")
        if self.keys is not None and self.keys < 1:
            raise OptionError(f"keys={self.keys} must be at least 1 slot; None shows everything")


def calibration_of(edit: Edit, given: Calibration | None) -> Calibration:
    """The calibration for an edit: the eraser's, the one in the cache folder, or one that is made now."""
    source = source_of(edit.backend)
    if given is not None:
        given.check(source)
        return given

    def own() -> Tensor:
        row = edit.tokens.ids[0]
        kept = edit.kept if edit.tokens.mask is None else edit.kept[edit.tokens.mask[0, edit.kept] != 0]
        return row[kept]

    if not edit.calibrated:
        edit.calibrated.append(calibration_for(source, edit.text or own))
    return edit.calibrated[0]


def choose_readers(edit: Edit, wish: Wish, given: Calibration | None = None) -> Choice | None:
    """The readers of the edit's spans that are to be recomputed, and what they see.

    Falls back to the next tokens where readers cannot be told, and says so in the choice's notes.

    Args:
        given: the eraser's calibration, if it has one.

    Returns:
        None when nothing is to be recomputed.
    """
    counts = readers_for(edit.said, wish.repair)
    budget = sum(counts)
    if not budget:
        return None
    if Can.REPAIR not in edit.backend.can:
        wish = replace(wish, keys=None, block=min(RUN, *counts) if wish.block is None else wish.block)
    kept = edit.kept
    suffix = kept[kept > edit.spans[0].start]
    if edit.tokens.mask is not None:
        suffix = suffix[edit.tokens.mask[:, suffix].bool().any(0)]
    if not len(suffix):
        return None
    if budget >= len(suffix) and wish.coverage is None and (wish.keys is None or len(kept) <= ALL * wish.keys):
        return Choice(suffix, edit.after, 0.0)  # all of them: nobody need be asked who has read what
    try:
        calibration = calibration_of(edit, given)
        if not calibration.tells:
            raise CalibrationError(
                f"keys and values explain {calibration.explained:.0%} of this model's queries (of too little text, maybe)"
            )
    except (CalibrationError, UnsupportedCacheError) as error:
        note = f"readers of the span could not be told, the next tokens were recomputed instead: {error}"
        return next_tokens(edit, counts, note)
    unread = sorted((*edit.marks.steered_spans, *edit.blank))
    scene = Scene.of(source_of(edit.backend), edit.tokens, edit.spans, unread, calibration)
    slots = scene.suffix
    scores = scene.thin().amax(0)
    always = first_behind(edit.spans, slots, budget)
    weights = weights_of(slots)
    candidates = (scores * weights).topk(min(max(CLOSER * budget, CANDIDATES), len(slots))).indices.sort().values
    close = scene.close(slots[candidates]).amax(0)
    scores = scores * (close.sum() / scores[candidates].sum().clamp(min=1e-9))  # both looks on one scale
    scores[candidates] = close
    chosen = choose(slots, scores, always, budget, weights=weights, coverage=wish.coverage, block=wish.block)
    left = residual(slots, scores, chosen)
    sees, samples, stand_for = _sight(scene, kept, chosen, wish.keys)
    return Choice(chosen, with_slots(sees, edit.fresh), left, samples=samples, stand_for=stand_for)


def _sight(scene: Scene, kept: Tensor, chosen: Tensor, keys: int | None) -> tuple[Tensor, Tensor | None, float]:
    """What the chosen tokens see: everything that stays, or the sink, the slots right before each, and what they need.

    Returns:
        The slots, samples of the others (None where there are none), and for how many slots each sample stands.
    """
    seen = kept[kept <= int(chosen[-1])]
    if keys is None or len(seen) <= ALL * keys:
        return seen, None, 1.0
    shown = torch.zeros(scene.tokens.length, dtype=torch.bool, device=kept.device)
    near = chosen[:, None] - torch.arange(NEAREST, device=kept.device)
    shown[near.clamp(min=0)] = True
    shown[scene.needed(chosen, SHARED * keys)] = True
    for land in scene.lands:
        shown[land.sink] = True
    stays = torch.zeros_like(shown)
    stays[kept] = True
    shown &= stays
    sees = shown.nonzero()[:, 0]
    shown[chosen] = True
    others = seen[~shown[seen]]
    count = min(SAMPLED * keys, len(others))
    if not count:
        return sees, None, 1.0
    places = (torch.arange(count, device=kept.device) + 0.5) * (len(others) / count)
    return sees, others[places.long()], len(others) / count


def most_shown(count: int, kept: int, keys: int | None) -> int:
    """How many of the `kept` slots `count` chosen tokens see at most."""
    if keys is None or kept <= ALL * keys:
        return kept
    return min((SHARED + SAMPLED) * keys + NEAREST * count + SINK, kept)


def next_tokens(edit: Edit, counts: Sequence[int], note: str) -> Choice:
    """The live tokens that come next, so many behind each of the spans, seeing everything that stays."""
    runs = edit.runs_behind(counts)
    return Choice(slots_of(runs, edit.tokens.ids.device), edit.after, None, (note,))
