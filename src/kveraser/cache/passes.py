"""Caches for one pass of the model over tokens that already have slots.

Knows: how transformers' models talk to a cache. Does not know whether an eraser is active or why tokens are run again.

A pass cache stands in for the user's cache during one forward. Its layers write the new keys and values straight into
the user's slots, layer by layer, and let the tokens attend to what the pass is meant to see:

    rewrite a range        everything before it, and itself; nothing is copied
    rewrite runs           each sees chosen slots before it, and itself
    look only              the same as a range, nothing is written, stops after a given layer

Tokens that are run again wherever they are, as if something before them were not there, are `repair`'s.

transformers aligns its causal mask to the cache's length, so `get_seq_length()` is the number of *visible* slots before
the tokens; positions are always given explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.cache.stand_in import StandInLayer, additive
from kveraser.cache.support import writing
from kveraser.cache.surgery import truncate
from kveraser.cache.tokens import Tokens
from kveraser.interrupts import uninterrupted
from kveraser.model.attention import for_masks
from kveraser.model.kernels import without_cudnn
from kveraser.model.view import decoder, evaluating
from kveraser.spans import Span, union_spans

Window = tuple[int, int]
"""`(sink, local)`: how many of the first slots, and of the slots right before the span, a pass attends to."""


PREFILL_CHUNK = 512
"""Tokens per forward in a long prefill on a CPU: attention scores take `chunk x context` memory, never `context x context`."""
_PREFILL_CHUNK_ELSEWHERE = 2048
"""The same where a forward takes as long to start as 512 tokens take to run, and scores are never held."""


def window_spans(window: Window | None, start: int) -> tuple[Span, ...]:
    """The slots before `start` that a pass attends to: all, or the window's two ranges (joined where they meet)."""
    if start == 0:
        return ()
    if window is None or sum(window) >= start:
        return (Span(0, start),)
    sink, local = window
    return tuple(Span(a, b) for a, b in ((0, sink), (start - local, start)) if b > a)


class _Stop(Exception):
    """Ends a forward once the states that were wanted are there."""


class PassLayer(StandInLayer):
    """A stand-in for one layer of the user's cache; `seen` slots are visible before the tokens of the pass."""

    def __init__(self, layer: DynamicLayer, seen: int) -> None:
        super().__init__(seen)
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new states, and give those that the tokens attend to."""
        raise NotImplementedError

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the user's layer."""
        assert self.layer.keys is not None and self.layer.values is not None
        return self.layer.keys, self.layer.values


class _RunsLayer(PassLayer):
    """Writes runs of slots and shows others, as they are then.

    Args:
        written: slots of the tokens, in their order.
        shown: slots to show.
    """

    def __init__(self, layer: DynamicLayer, written: tuple[Span, ...], shown: tuple[Span, ...]) -> None:
        super().__init__(layer, sum(map(len, shown)) - sum(map(len, written)))
        self.written, self.shown = written, shown
        self.lengths = [len(run) for run in written]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = []
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            for run, part in zip(self.written, new.split(self.lengths, -2), strict=True):
                states[:, :, run.slice] = part
            parts = [states[:, :, run.slice] for run in self.shown]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return found[0], found[1]


class _LookLayer(PassLayer):
    """Shows `[0, start)` and the new states, writes nothing; keeps the new ones when asked, and then stops the pass."""

    def __init__(self, layer: DynamicLayer, start: int, keep: bool) -> None:
        super().__init__(layer, start)
        self.keep = keep
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.found = (key_states, value_states)
            raise _Stop
        keys, values = (states[:, :, : self.seen] for states in self.states)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def _forward(model: nn.Module, ids: Tensor, positions: Tensor, cache: Cache, mask: Tensor | None) -> None:
    body = evaluating(decoder(model))
    with without_cudnn():
        body(
            input_ids=ids,
            position_ids=positions.expand(ids.shape),
            past_key_values=cache,
            attention_mask=mask,
            use_cache=True,
        )


def run_pass(
    model: nn.Module,
    cache: Cache,
    layers: Sequence[PassLayer],
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> None:
    """Run tokens through the model with `layers` in the place of the cache's own."""
    with writing(cache), suppress(_Stop):
        _forward(model, ids, positions, Cache(layers=list(layers)), mask)


@dataclass(frozen=True)
class Rewrite:
    """Tokens that a pass runs again.

    Attributes:
        slots: where they are.
        sees: slots before them that they attend to, besides themselves.
    """

    slots: Span
    sees: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.slots)


def rewrite_runs(model: nn.Module, cache: Cache, tokens: Tokens, rewrites: Sequence[Rewrite]) -> int:
    """Run tokens again, all in one forward, and write their states into their slots; returns the bytes written.

    Tokens attend causally to the others of their `Rewrite` and to the slots that it sees, as these are after the pass.
    """
    written, shown = tuple(rewrite.slots for rewrite in rewrites), shown_slots(rewrites)
    layers = [_RunsLayer(layer, written, shown) for layer in cache.layers]
    mask = None
    if len(rewrites) > 1 or len(shown) > 1:
        model = for_masks(model)
        mask = additive(visible_slots(tokens, rewrites, shown), cache.layers[0].keys.dtype)
    elif tokens.mask is not None:
        mask = torch.cat([tokens.mask[:, run.slice] for run in shown], -1)
    ids = torch.cat([tokens.ids[:, run.slice] for run in written], -1)
    run_pass(model, cache, layers, ids, torch.cat([tokens.position(run) for run in written], -1), mask)
    return range_bytes(cache, ids.shape[1])


def shown_slots(rewrites: Sequence[Rewrite]) -> tuple[Span, ...]:
    """The slots that any of the tokens attends to."""
    return union_spans(run for rewrite in rewrites for run in (*rewrite.sees, rewrite.slots))


def visible_slots(tokens: Tokens, rewrites: Sequence[Rewrite], shown: tuple[Span, ...]) -> Tensor:
    """What each token attends to of the shown slots, `(batch or 1, 1, tokens, slots)` bool."""
    columns = torch.cat([torch.arange(run.start, run.end) for run in shown])
    rows = []
    for rewrite in rewrites:
        own = torch.arange(rewrite.slots.start, rewrite.slots.end)[:, None]
        seen = (columns >= rewrite.slots.start) & (columns <= own)
        for run in rewrite.sees:
            seen |= (columns >= run.start) & (columns < run.end)
        rows.append(seen)
    visible = torch.cat(rows).to(tokens.ids.device)[None, None]
    if tokens.mask is not None:
        visible = visible & tokens.mask[:, None, None, columns.to(tokens.mask.device)].bool()
    return visible


def rewrite_range(model: nn.Module, cache: Cache, tokens: Tokens, span: Span) -> int:
    """Run the tokens of `span` again and write their states into their slots; returns the bytes written.

    They attend to all slots before them and causally to themselves: with the unchanged model, this is exact
    recomputation.
    """
    before = (Span(0, span.start),) if span.start else ()
    return rewrite_runs(model, cache, tokens, [Rewrite(span, before)])


def prefill_chunk(device: torch.device) -> int:
    """Tokens per forward in a long prefill there."""
    return PREFILL_CHUNK if device.type == "cpu" else _PREFILL_CHUNK_ELSEWHERE


def recompute(model: nn.Module, cache: Cache, tokens: Tokens, span: Span, chunk: int) -> int:
    """`rewrite_range` in chunks, as a chunked prefill would compute them; returns the bytes written."""
    borders = [*range(span.start, span.end, chunk), span.end]
    return sum(rewrite_range(model, cache, tokens, Span(a, b)) for a, b in pairwise(borders))


def extend(model: nn.Module, cache: Cache, tokens: Tokens, chunk: int) -> None:
    """Prefill: run the tokens that have no slot yet (`tokens` holds all ids) and append their states, in chunks.

    When it fails or is interrupted, the slots it had added are dropped again.
    """
    start = int(cache.get_seq_length())
    borders = [*range(start, tokens.length, chunk), tokens.length]
    try:
        with writing(cache):
            for a, b in pairwise(borders):
                span = Span(a, b)
                mask = None if tokens.mask is None else tokens.mask[:, :b]
                _forward(model, tokens.ids[:, span.slice], tokens.position(span), cache, mask)
    except BaseException:
        with uninterrupted():
            truncate(cache, start)
        raise


def look(model: nn.Module, cache: Cache, tokens: Tokens, span: Span, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `(batch, kv_heads, tokens, head_dim)` that a fresh prefill would give `span` in one layer.

    Runs the layers below `layer` only and writes nothing. Layer 0's depend on tokens and positions alone.
    """
    before = span.start if layer else 0
    layers = [_LookLayer(entry, before, index == layer) for index, entry in enumerate(cache.layers)]
    mask = None if tokens.mask is None else tokens.mask[:, span.start - before : span.end]
    run_pass(model, cache, layers, tokens.ids[:, span.slice], tokens.position(span), mask)
    found = layers[layer].found
    assert found is not None
    return found


def range_bytes(cache: Cache, count: int) -> int:
    """Bytes of the states of so many slots."""
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            total += states.shape[0] * states.shape[1] * count * states.shape[3] * states.element_size()
    return total
