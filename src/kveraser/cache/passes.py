"""Caches for one pass of the model over tokens that already have slots.

Knows: how transformers' models talk to a cache. Does not know whether an eraser is active or why tokens are run again.

A pass cache stands in for the user's cache during one forward. Its layers write the new keys and values straight into
the user's slots, layer by layer, and let the tokens attend to what the pass is meant to see:

    rewrite a range        everything before it, and itself; nothing is copied
    rewrite runs           each sees chosen slots before it, and itself, and may be computed as if a gap before it were not there
    rewrite chosen slots   everything up to itself
    look only              the same as a range, nothing is written, stops after a given layer

transformers aligns its causal mask to the cache's length, so `get_seq_length()` is the number of *visible* slots before
the tokens; positions are always given explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.attention import for_masks
from kveraser.cache.support import writing
from kveraser.interrupts import uninterrupted
from kveraser.model_view import decoder, evaluating
from kveraser.rope import Rotation, frequencies, rotary_layout
from kveraser.spans import Span, union_spans

Window = tuple[int, int]
"""`(sink, local)`: how many of the first slots, and of the slots right before the span, a pass attends to."""


PREFILL_CHUNK = 512
"""Tokens per forward in a long prefill: attention scores take `chunk x context` memory, never `context x context`."""


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


class _PassLayer(DynamicLayer):
    """A stand-in for one layer of the user's cache; `seen` slots are visible before the tokens of the pass."""

    def __init__(self, layer: DynamicLayer, seen: int) -> None:
        super().__init__()
        self.layer, self.seen, self.is_initialized = layer, seen, True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new states, and give those that the tokens attend to."""
        raise NotImplementedError

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the user's layer."""
        assert self.layer.keys is not None and self.layer.values is not None
        return self.layer.keys, self.layer.values


class _RunsLayer(_PassLayer):
    """Writes runs of slots and shows others, as they are then; the last tokens' keys are moved before they are written,
    and shown to these tokens as they were made.

    Args:
        written: slots of all tokens, in the tokens' order.
        shown: slots to show.
        moved: how many tokens at the end have their keys moved, by `move`.
    """

    def __init__(
        self,
        layer: DynamicLayer,
        written: tuple[Span, ...],
        shown: tuple[Span, ...],
        moved: int,
        move: Callable[[Tensor], Tensor] | None,
    ) -> None:
        tokens = sum(map(len, written))
        super().__init__(layer, sum(map(len, shown)) + moved - tokens)
        self.written, self.shown, self.still, self.move = written, shown, tokens - moved, move
        self.lengths = [len(run) for run in written]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept, moves = key_states, key_states.shape[-2] > self.still
        if moves and self.move is not None:
            kept = torch.cat([kept[:, :, : self.still], self.move(kept[:, :, self.still :])], -2)
        found = []
        pairs = (key_states, kept), (value_states, value_states)
        for states, (new, keep) in zip(self.states, pairs, strict=True):
            for run, part in zip(self.written, keep.split(self.lengths, -2), strict=True):
                states[:, :, run.slice] = part
            parts = [states[:, :, run.slice] for run in self.shown]
            if moves:
                parts.append(new[:, :, self.still :])
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return found[0], found[1]


class _SlotsLayer(_PassLayer):
    """Writes chosen slots and shows all of them."""

    def __init__(self, layer: DynamicLayer, slots: Tensor) -> None:
        super().__init__(layer, 0)
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            states[:, :, self.slots] = new
        return self.states


class _LookLayer(_PassLayer):
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


@dataclass(frozen=True)
class Tokens:
    """What a pass needs to know of the tokens whose states are in a cache.

    Attributes:
        ids: `(batch, tokens)` int64, one per slot.
        positions: `(batch, tokens)` int64, or None where slot `i` has position `i` in every row.
        mask: `(batch, tokens)`, 0 where a slot is padding; None where none is.
    """

    ids: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.ids.shape[1]

    def position(self, span: Span) -> Tensor:
        """Positions of the slots in `span`, `(batch or 1, tokens)`."""
        if self.positions is not None:
            return self.positions[:, span.slice]
        return torch.arange(span.start, span.end, device=self.ids.device)[None]

    def head(self, length: int) -> Tokens:
        """The first `length` of the tokens."""
        parts = [None if part is None else part[:, :length] for part in (self.positions, self.mask)]
        return Tokens(self.ids[:, :length], parts[0], parts[1])

    def without(self, spans: Sequence[Span]) -> Tokens:
        """The tokens that are left when the slots `spans` are cut out: what was behind them moves up."""
        if not spans:
            return self
        keep = torch.ones(self.length, dtype=torch.bool, device=self.ids.device)
        for span in spans:
            keep[span.slice] = False
        mask = None if self.mask is None else self.mask[:, keep]
        positions = self.positions
        if positions is not None:
            gone = torch.where(keep, 0, 1 if self.mask is None else self.mask.long())
            positions = (positions - gone.expand(positions.shape).cumsum(-1)).clamp(min=0)[:, keep]
        return Tokens(self.ids[:, keep], positions, mask)


def count_positions(mask: Tensor) -> Tensor:
    """Positions `(batch, tokens)` as `model.generate` counts them: real tokens from 0, padding anywhere."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _forward(model: nn.Module, ids: Tensor, positions: Tensor, cache: Cache, mask: Tensor | None) -> None:
    body = evaluating(decoder(model))
    body(
        input_ids=ids,
        position_ids=positions.expand(ids.shape),
        past_key_values=cache,
        attention_mask=mask,
        use_cache=True,
    )


def _pass(
    model: nn.Module,
    cache: Cache,
    layers: Sequence[_PassLayer],
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
        slots: where they are: disjoint runs, in order.
        sees: slots before them that they attend to, besides themselves.
        gap: slots right before them that they are computed without, at the positions that they would have then; their
            keys are moved to the positions of their slots. So a token whose states depend on the one right before it
            meets its neighbor across the gap.
    """

    slots: tuple[Span, ...]
    sees: tuple[Span, ...]
    gap: Span | None = None

    def __len__(self) -> int:
        return sum(map(len, self.slots))


def rewrite_runs(model: nn.Module, cache: Cache, tokens: Tokens, rewrites: Sequence[Rewrite]) -> int:
    """Run tokens again, all in one forward, and write their states into their slots; returns the bytes written.

    Tokens attend causally to the others of their `Rewrite` and to the slots that it sees, as these are after the pass.

    Args:
        rewrites: at least one; those with a gap come last.

    Raises:
        UnsupportedCacheError: the model's keys cannot be moved, and a gap asks for it.
    """
    written = tuple(run for rewrite in rewrites for run in rewrite.slots)
    moved = sum(len(rewrite) for rewrite in rewrites if rewrite.gap is not None)
    still = tuple(run for rewrite in rewrites if rewrite.gap is None for run in rewrite.slots)
    shown = union_spans((*(run for rewrite in rewrites for run in rewrite.sees), *still))
    positions = torch.cat([tokens.position(run) for run in written], -1)
    moves: list[Rotation | None] = [None] * len(cache.layers)
    if moved:
        delta = torch.cat([_gone(tokens, rewrite) for rewrite in rewrites], -1)
        near = (positions - delta).clamp(min=0)
        layout = rotary_layout(model)
        move = Rotation((positions - near)[:, -moved:], frequencies(model), layout.pairing)
        moves = [move if rotary else None for rotary in layout.rotary]
        positions = near
    layers = [_RunsLayer(layer, written, shown, moved, move) for layer, move in zip(cache.layers, moves, strict=True)]
    mask = None
    if len(rewrites) > 1 or moved or len(shown) > 1:
        model = for_masks(model)
        mask = _additive(_visible(tokens, rewrites, shown, moved), cache)
    elif tokens.mask is not None:
        mask = torch.cat([tokens.mask[:, run.slice] for run in shown], -1)
    ids = torch.cat([tokens.ids[:, run.slice] for run in written], -1)
    _pass(model, cache, layers, ids, positions, mask)
    return _range_bytes(cache, ids.shape[1])


def _gone(tokens: Tokens, rewrite: Rewrite) -> Tensor:
    """How many positions nearer the tokens stand without their gap, `(batch or 1, tokens)`."""
    gap = rewrite.gap
    if gap is None:
        count = torch.zeros(1, 1, dtype=torch.long, device=tokens.ids.device)
    elif tokens.mask is None:
        count = torch.full((1, 1), len(gap), device=tokens.ids.device)
    else:
        count = tokens.mask[:, gap.slice].long().sum(-1, keepdim=True)
    rows = 1 if tokens.mask is None else len(tokens.mask)
    return count.expand(rows, len(rewrite))


def _visible(tokens: Tokens, rewrites: Sequence[Rewrite], shown: tuple[Span, ...], moved: int) -> Tensor:
    """What each token attends to, `(batch or 1, 1, tokens, columns)`; columns: the shown slots, then what is moved."""
    slots = torch.cat([torch.arange(run.start, run.end) for rewrite in rewrites for run in rewrite.slots])
    columns = torch.cat([*(torch.arange(run.start, run.end) for run in shown), slots[len(slots) - moved :]])
    as_made = len(columns) - moved
    visible = torch.zeros(len(slots), len(columns), dtype=torch.bool)
    at = 0
    for rewrite in rewrites:
        rows = slice(at, at + len(rewrite))
        at = rows.stop
        for run in rewrite.sees:
            visible[rows, :as_made] |= (columns[:as_made] >= run.start) & (columns[:as_made] < run.end)
        own = slice(0, as_made) if rewrite.gap is None else slice(as_made, None)
        for run in rewrite.slots:
            inside = (columns[own] >= run.start) & (columns[own] < run.end)
            visible[rows, own] |= inside & (columns[own] <= slots[rows, None])
    visible = visible.to(tokens.ids.device)[None, None]
    if tokens.mask is not None:
        visible = visible & tokens.mask[:, None, None, columns.to(tokens.mask.device)].bool()
    return visible


def _additive(visible: Tensor, cache: Cache) -> Tensor:
    """A mask to add to attention scores, in the cache's type."""
    dtype = cache.layers[0].keys.dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def rewrite_range(model: nn.Module, cache: Cache, tokens: Tokens, span: Span) -> int:
    """Run the tokens of `span` again and write their states into their slots; returns the bytes written.

    They attend to all slots before them and causally to themselves: with the unchanged model, this is exact
    recomputation.
    """
    before = (Span(0, span.start),) if span.start else ()
    return rewrite_runs(model, cache, tokens, [Rewrite((span,), before)])


def recompute(model: nn.Module, cache: Cache, tokens: Tokens, span: Span, chunk: int = PREFILL_CHUNK) -> int:
    """`rewrite_range` in chunks, as a chunked prefill would compute them; returns the bytes written."""
    borders = [*range(span.start, span.end, chunk), span.end]
    return sum(rewrite_range(model, cache, tokens, Span(a, b)) for a, b in pairwise(borders))


def extend(model: nn.Module, cache: Cache, tokens: Tokens, chunk: int = PREFILL_CHUNK) -> None:
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
            for layer in cache.layers:  # the interrupted pass may have reached only some of the layers
                layer.crop(start - int(layer.get_seq_length()))
        raise


def rewrite_slots(model: nn.Module, cache: Cache, tokens: Tokens, slots: Tensor) -> int:
    """Run the tokens at `slots` (sorted, `(n,)`) again, all at once, and write their states; returns the bytes written.

    Each attends to every slot up to its own; those among `slots` are seen in their new state, layer by layer.
    """
    device, length = tokens.ids.device, int(cache.get_seq_length())
    visible = torch.arange(length, device=device)[None, :] <= slots[:, None]
    visible = visible[None, None]
    if tokens.mask is not None:
        visible = visible & tokens.mask[:, None, None, :length].bool()
    layers = [_SlotsLayer(layer, slots) for layer in cache.layers]
    positions = tokens.position(Span(0, length))[:, slots]
    _pass(for_masks(model), cache, layers, tokens.ids[:, slots], positions, _additive(visible, cache))
    return _range_bytes(cache, len(slots))


def look(model: nn.Module, cache: Cache, tokens: Tokens, span: Span, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `(batch, kv_heads, tokens, head_dim)` that a fresh prefill would give `span` in one layer.

    Runs the layers below `layer` only and writes nothing.
    """
    layers = [_LookLayer(entry, span.start, index == layer) for index, entry in enumerate(cache.layers)]
    mask = None if tokens.mask is None else tokens.mask[:, : span.end]
    _pass(model, cache, layers, tokens.ids[:, span.slice], tokens.position(span), mask)
    found = layers[layer].found
    assert found is not None
    return found


def _range_bytes(cache: Cache, count: int) -> int:
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            total += states.shape[0] * states.shape[1] * count * states.shape[3] * states.element_size()
    return total
