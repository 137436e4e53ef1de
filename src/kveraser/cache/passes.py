"""Caches for one pass of the model over tokens that already have slots.

Knows: how transformers' models talk to a cache. Does not know whether an eraser is active or why tokens are run again.

A pass cache stands in for the user's cache during one forward. Its layers write the new keys and values straight into
the user's slots, layer by layer, and let the tokens attend to what the pass is meant to see:

    rewrite a range        [0 ............ start)[start .. end)            everything before it, and itself
    with a window          [0, sink) + [start - local, start)[start, end)  a constant number of slots, and itself
    rewrite behind a gap   the same, as if the tokens stood where the gap begins; their keys are then moved to their slots
    rewrite chosen slots   everything; the caller gives a 4-D mask
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

from kveraser.cache.support import writing
from kveraser.errors import CacheMismatchError
from kveraser.interrupts import uninterrupted
from kveraser.model_view import decoder, evaluating, text_config
from kveraser.rope import frequencies, rotary_layout, rotate
from kveraser.spans import Span, merge_spans

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


class _PassLayer(DynamicLayer):
    """A stand-in for one layer of the user's cache; `seen` slots are visible before the tokens of the pass."""

    def __init__(self, layer: DynamicLayer, seen: int) -> None:
        super().__init__()
        self.layer, self.seen, self.is_initialized = layer, seen, True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class _RangeLayer(_PassLayer):
    """Writes `[start, end)` and shows the window before it."""

    def __init__(self, layer: DynamicLayer, span: Span, before: tuple[Span, ...]) -> None:
        super().__init__(layer, sum(len(run) for run in before))
        self.span, self.shown = span, merge_spans((*before, span), span.end)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        shown = []
        for states, new in ((self.layer.keys, key_states), (self.layer.values, value_states)):
            assert states is not None
            states[:, :, self.span.slice] = new
            runs = [states[:, :, run.slice] for run in self.shown]
            shown.append(runs[0] if len(runs) == 1 else torch.cat(runs, -2))
        return shown[0], shown[1]


class _BehindLayer(_PassLayer):
    """Writes runs of slots, with keys moved to their positions, and shows the window and the keys as they were made."""

    def __init__(
        self, layer: DynamicLayer, runs: tuple[Span, ...], before: tuple[Span, ...], move: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(layer, sum(len(run) for run in before))
        self.runs, self.before, self.move = runs, before, move

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        shown = []
        lengths = [len(run) for run in self.runs]
        for states, new, kept in (
            (self.layer.keys, key_states, self.move(key_states)),
            (self.layer.values, value_states, value_states),
        ):
            assert states is not None
            for run, part in zip(self.runs, kept.split(lengths, -2), strict=True):
                states[:, :, run.slice] = part
            shown.append(torch.cat([*(states[:, :, run.slice] for run in self.before), new], -2))
        return shown[0], shown[1]


class _SlotsLayer(_PassLayer):
    """Writes chosen slots and shows all of them."""

    def __init__(self, layer: DynamicLayer, slots: Tensor) -> None:
        super().__init__(layer, 0)
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.layer.keys is not None and self.layer.values is not None
        self.layer.keys[:, :, self.slots] = key_states
        self.layer.values[:, :, self.slots] = value_states
        return self.layer.keys, self.layer.values


class _Stop(Exception):
    """Ends a forward once the states that were wanted are there."""


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
        assert self.layer.keys is not None and self.layer.values is not None
        return (
            torch.cat([self.layer.keys[:, :, : self.seen], key_states], -2),
            torch.cat([self.layer.values[:, :, : self.seen], value_states], -2),
        )


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


def rewrite_range(
    model: nn.Module, cache: Cache, tokens: Tokens, span: Span, window: Window | None = None, ids: Tensor | None = None
) -> int:
    """Run the tokens of `span` again and write their states into their own slots; returns the bytes written.

    They attend to the cached slots before them (with `window`, to a constant number of those) and causally to
    themselves. Without a window and with the unchanged model, this is exact recomputation.

    Args:
        ids: other ids `(batch, len(span))` to run in these slots.
    """
    before = window_spans(window, span.start)
    pass_cache = Cache(layers=[_RangeLayer(layer, span, before) for layer in cache.layers])
    mask = None
    if tokens.mask is not None:
        mask = torch.cat([tokens.mask[:, run.slice] for run in (*before, span)], -1)
    with writing(cache):
        _forward(model, tokens.ids[:, span.slice] if ids is None else ids, tokens.position(span), pass_cache, mask)
    return _range_bytes(cache, len(span))


def rewrite_behind(
    model: nn.Module,
    cache: Cache,
    tokens: Tokens,
    gap: Span,
    runs: tuple[Span, ...],
    window: Window | None = None,
) -> int:
    """Run the tokens of `runs` again as if the slots `gap` before them were not there; returns the bytes written.

    They attend to the slots before the gap (with `window`, to a constant number of those) and causally to themselves, at
    the positions they would have; then their keys are moved to the positions of their slots. So a token whose
    states depend on the one right before it meets its neighbor across the gap.

    Raises:
        UnsupportedCacheError: the model's keys cannot be moved.
    """
    before = window_spans(window, gap.start)
    gone = len(gap) if tokens.mask is None else tokens.mask[:, gap.slice].long().sum(-1, keepdim=True)
    there = torch.cat([tokens.position(run) for run in runs], -1)
    near = (there - gone).clamp(min=0)
    delta = there - near
    layout, inv_freq = rotary_layout(model), frequencies(model)

    def move(keys: Tensor) -> Tensor:
        return rotate(keys, delta, inv_freq, layout.pairing)

    layers = [
        _BehindLayer(layer, runs, before, move if rotary else lambda keys: keys)
        for rotary, layer in zip(layout.rotary, cache.layers, strict=True)
    ]
    mask = None
    if tokens.mask is not None:
        mask = torch.cat([tokens.mask[:, run.slice] for run in (*before, *runs)], -1)
    ids = torch.cat([tokens.ids[:, run.slice] for run in runs], -1)
    with writing(cache):
        _forward(model, ids, near, Cache(layers=list(layers)), mask)
    return _range_bytes(cache, ids.shape[1])


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

    Raises:
        CacheMismatchError: the model's attention implementation cannot take a 4-D mask.
    """
    implementation = text_config(model)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise CacheMismatchError(
            f"recomputing scattered tokens needs a 4-D attention mask, which attn_implementation={implementation!r} "
            "does not take; load the model with attn_implementation='sdpa'"
        )
    device, length = tokens.ids.device, int(cache.get_seq_length())
    visible = torch.arange(length, device=device)[None, :] <= slots[:, None]
    visible = visible[None, None]
    if tokens.mask is not None:
        visible = visible & tokens.mask[:, None, None, :length].bool()
    dtype = cache.layers[0].keys.dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
    pass_cache = Cache(layers=[_SlotsLayer(layer, slots) for layer in cache.layers])
    positions = tokens.position(Span(0, length))[:, slots]
    with writing(cache):
        _forward(model, tokens.ids[:, slots], positions, pass_cache, mask)
    return _range_bytes(cache, len(slots))


def look(model: nn.Module, cache: Cache, tokens: Tokens, span: Span, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `(batch, kv_heads, tokens, head_dim)` that a fresh prefill would give `span` in one layer.

    Runs the layers below `layer` only and writes nothing.
    """
    layers = [_LookLayer(entry, span.start, index == layer) for index, entry in enumerate(cache.layers)]
    mask = None if tokens.mask is None else tokens.mask[:, : span.end]
    with writing(cache), suppress(_Stop):
        _forward(model, tokens.ids[:, span.slice], tokens.position(span), Cache(layers=list(layers)), mask)
    found = layers[layer].found
    assert found is not None
    return found


def _range_bytes(cache: Cache, count: int) -> int:
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            total += states.shape[0] * states.shape[1] * count * states.shape[3] * states.element_size()
    return total
