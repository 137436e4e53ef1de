"""Running tokens again in the slots they have, as if something before them had never been there.

Knows: passes, rotary embeddings. Does not know which tokens are worth it.

A token behind an erased span must be computed as the shortened context would have it: what is absent is not seen, and the
gap it leaves is closed. Moving keys over the gap would round them once more, which wrecks models with large key biases in
bfloat16. So the *query* is turned instead, in float32 and for the slots before a gap only: attention depends on relative
positions, and the query is not rounded again. The key is then stored as the model computes it at its own position.

    slots      | before a | gap a | between | gap b | behind |      a query behind both is turned back by
                 a + b               b                 0            so many positions for the keys of each block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.cache.passes import PassLayer, Rewrite, range_bytes, run_pass, shown_slots, visible_slots
from kveraser.cache.stand_in import additive
from kveraser.cache.tokens import Tokens
from kveraser.errors import UnsupportedCacheError
from kveraser.model.attention import blockwise_attention, for_telling, grouped_attention
from kveraser.model.rope import Rotation, frequencies, has_rotary, rotary_layout
from kveraser.model.view import causal_lm
from kveraser.spans import Span


@dataclass(frozen=True)
class Repair:
    """Tokens that the plain model runs again, all at once.

    Attributes:
        slots: `(n,)` int64, where they are, in order.
        sees: `(m,)` int64, slots that they attend to as far as these are not behind them, in order; their own among them.
        absent: spans (in order, none of these slots in them) that they are computed without.
        stand_for: `(m,)` float32, how many slots like it each of `sees` stands for; None: for itself alone.
    """

    slots: Tensor
    sees: Tensor
    absent: tuple[Span, ...] = ()
    stand_for: Tensor | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def parts(self, most: int) -> tuple[Repair, ...]:
        """The same in passes of at most so many tokens, one after the other: each sees what is new in those before it."""
        if len(self) <= most:
            return (self,)
        found = []
        for slots in self.slots.split(most):
            seen = int((self.sees <= slots[-1]).sum())
            stand_for = None if self.stand_for is None else self.stand_for[:seen]
            found.append(Repair(slots, self.sees[:seen], self.absent, stand_for))
        return tuple(found)


def can_close_gaps(model: nn.Module) -> bool:
    """Whether tokens can be computed as if a gap before them were closed; without rotary positions there is none to see."""
    if not has_rotary(model):
        return False
    try:
        frequencies(model)
        rotary_layout(model)
    except UnsupportedCacheError:
        return False
    return True


class _Sight:
    """One repair, made ready for the attention of every layer."""

    def __init__(self, model: nn.Module, cache: Cache, tokens: Tokens, repair: Repair) -> None:
        slots, sees = repair.slots, repair.sees
        visible = (sees[None] <= slots[:, None])[None, None]
        if tokens.mask is not None:
            visible = visible & tokens.mask[:, None, None, sees].bool()
        self.mask = additive(visible, torch.float32)
        if (
            repair.stand_for is not None
        ):  # n slots of the same key and value weigh n times as much as one: exp(score + log n)
            self.mask = self.mask + repair.stand_for.log()
        self.sees, self.whole = sees, len(sees) == int(sees[-1]) + 1
        self.blocks = self._blocks(model, tokens, repair)

    @staticmethod
    def _blocks(model: nn.Module, tokens: Tokens, repair: Repair) -> list[tuple[slice, Rotation | None]]:
        """The columns between gaps, each with the turn of the queries that closes the gaps behind it."""
        whole = slice(0, len(repair.sees))
        if not repair.absent or not can_close_gaps(model):
            return [(whole, None)]
        counts = [  # how many real tokens each gap takes away, per row
            torch.full((1, 1), len(span), device=tokens.ids.device)
            if tokens.mask is None
            else tokens.mask[:, span.slice].long().sum(-1, keepdim=True)
            for span in repair.absent
        ]

        def before(places: Tensor) -> Tensor:
            """How many are gone before some slots, `(batch or 1, slots)`."""
            gone = (count * (places >= span.end) for span, count in zip(repair.absent, counts, strict=True))
            return torch.stack(list(gone)).sum(0)

        ends = torch.tensor([span.end for span in repair.absent], device=tokens.ids.device)
        passed = torch.searchsorted(ends, repair.sees, right=True)
        edges = [0, *((passed[1:] != passed[:-1]).nonzero()[:, 0] + 1).tolist(), len(repair.sees)]
        inv_freq, pairing = frequencies(model), rotary_layout(model).pairing
        blocks: list[tuple[slice, Rotation | None]] = []
        for a, b in pairwise(edges):
            delta = (before(repair.slots) - before(repair.sees[a : a + 1])).clamp(min=0)
            blocks.append((slice(a, b), Rotation(-delta, inv_freq, pairing) if bool(delta.any()) else None))
        return blocks

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, rotary: bool) -> Tensor:
        """From `(batch, heads, n, head_dim)` queries to `(batch, n, heads, head_dim)`; scores are float32."""
        keys, values = self._shown(keys).float(), self._shown(values)
        plain = query.float() * scaling
        blocks = [
            (turn(plain) if turn is not None and rotary else plain, keys[:, :, columns])
            for columns, turn in self.blocks
        ]
        return blockwise_attention(blocks, values, lambda scores, rows: scores.add_(self.mask[:, :, rows])).transpose(
            1, 2
        )

    def _shown(self, states: Tensor) -> Tensor:
        """Of the states of all slots, those of the seen ones, without a copy where these are the first ones."""
        if self.whole:
            return states.narrow(2, 0, len(self.sees))
        return states.index_select(2, self.sees)


class _Steered:
    """The tokens of a pass that are steered, made ready like a `_Sight`."""

    def __init__(self, cache: Cache, tokens: Tokens, rewrites: Sequence[Rewrite]) -> None:
        self.shown = shown_slots(rewrites)
        self.mask = additive(visible_slots(tokens, rewrites, self.shown), cache.layers[0].keys.dtype)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        seen = [torch.cat([states[:, :, run.slice] for run in self.shown], -2) for states in (keys, values)]
        return grouped_attention(nn.Identity(), query, seen[0], seen[1], self.mask, scaling)[0]


class _ToldLayer(PassLayer):
    """Writes all tokens of a pass, and lets each kind attend to what it sees."""

    def __init__(self, layer: DynamicLayer, rotary: bool, steered: _Steered | None, written: Tensor,
                 first: int, sights: Sequence[tuple[slice, _Sight]]) -> None:  # fmt: skip
        super().__init__(layer, 0)
        self.rotary, self.steered, self.written, self.first, self.sights = rotary, steered, written, first, sights
        self.attended = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            states[:, :, self.written] = new
        key_states.attend = self.attend  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of all tokens of the pass, `(batch, tokens, heads, head_dim)`."""
        self.attended = True
        keys, values = self.states
        parts = []
        if self.steered is not None:
            parts.append(self.steered.attend(query[:, :, : self.first], keys, values, scaling))
        for rows, sight in self.sights:
            parts.append(sight.attend(query[:, :, rows], keys, values, scaling, self.rotary).to(query.dtype))
        return torch.cat(parts, 1)


def repair_slots(
    model: nn.Module, cache: Cache, tokens: Tokens, repairs: Sequence[Repair], steered: Sequence[Rewrite] = ()
) -> int:
    """Run tokens again in one forward and write their states into their slots; returns the bytes written.

    Args:
        repairs: tokens for the plain model; each sees the others of its own repair in their new state.
        steered: tokens that go first, for the eraser (which `model` then applies to so many of the first tokens).

    Raises:
        UnsupportedCacheError: the model does not use transformers' attention interface.
    """
    device = tokens.ids.device
    runs = [torch.arange(rewrite.slots.start, rewrite.slots.end, device=device) for rewrite in steered]
    first = sum(map(len, runs))
    written = torch.cat([*runs, *(repair.slots for repair in repairs)])
    sights, at = [], first
    for repair in repairs:
        sights.append((slice(at, at + len(repair)), _Sight(model, cache, tokens, repair)))
        at += len(repair)
    ready = _Steered(cache, tokens, steered) if steered else None
    rotary = rotary_layout(model).rotary if can_close_gaps(model) else [False] * len(cache.layers)
    layers = [
        _ToldLayer(layer, turns, ready, written, first, sights)
        for layer, turns in zip(cache.layers, rotary, strict=True)
    ]
    positions = written[None] if tokens.positions is None else tokens.positions[:, written]
    run_pass(for_telling(model), cache, layers, tokens.ids[:, written], positions, None)
    if not all(layer.attended for layer in layers):
        raise UnsupportedCacheError(
            f"{type(causal_lm(model)).__name__} does not use transformers' attention interface in every layer, so single "
            "tokens cannot be run again; use full-recompute or delete-and-shift"
        )
    return range_bytes(cache, len(written))
