"""Cutting slots out of a transformers cache, or making room in it: what follows moves, keys turned to their new positions.

Knows: rotary embeddings, the first layer's keys. Does not know what for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache

from kveraser.cache.passes import look, prefill_chunk
from kveraser.cache.surgery import cut, read, spread, state_bytes
from kveraser.cache.tokens import Tokens
from kveraser.model.rope import frequencies, rotary_layout, rotate
from kveraser.model.view import causal_lm
from kveraser.spans import Span, gaps


def check_movable(model: nn.Module) -> None:
    """Raise `UnsupportedCacheError` unless the model's keys can be moved."""
    frequencies(causal_lm(model))
    rotary_layout(model)


def delete_slots(
    model: nn.Module, cache: Cache, tokens: Tokens, spans: tuple[Span, ...], steered: Sequence[Span]
) -> tuple[Tokens, int]:
    """Cut slots out and re-rotate the keys behind them.

    Args:
        tokens: of all slots.
        steered: slots that hold steering states, where they are afterwards.

    Returns:
        The tokens that are left, and the bytes of keys and values that were moved.
    """
    left = tokens.without(spans)
    layout, inv_freq = rotary_layout(model), frequencies(model)
    before = tokens.position(Span(0, tokens.length))
    before = Tokens(before.expand(tokens.ids.shape)).without(spans).ids
    suffix = Span(spans[0].start, left.length)
    delta = left.position(suffix) - before[:, suffix.slice]
    if bool((delta == delta[:1, :1]).all()):
        delta = delta[0, 0]
    cut(cache, spans)
    for rotary, layer in zip(layout.rotary, cache.layers, strict=True):
        if rotary:
            layer.keys[:, :, suffix.slice] = rotate(layer.keys[:, :, suffix.slice], delta, inv_freq, layout.pairing)
    _remake_layer_0(model, cache, left, suffix, tuple(span for span in steered if span.end > suffix.start))
    return left, state_bytes(read(cache, suffix))


def open_slots(
    model: nn.Module, cache: Cache, tokens: Tokens, blank: tuple[Span, ...], steered: tuple[Span, ...]
) -> int:
    """Make room, which holds zeros, and re-rotate the keys behind it; returns the bytes of keys and values that were moved.

    Args:
        tokens: of all slots, with room.
        blank: the room, in order.
        steered: slots that hold steering states, where they are then.
    """
    layout, inv_freq = rotary_layout(model), frequencies(model)
    suffix = Span(blank[0].start, tokens.length)
    spread(cache, blank)
    moved = gaps(blank, suffix.end, suffix.start)
    for run in moved:
        delta = torch.tensor(sum(len(room) for room in blank if room.end <= run.start), device=tokens.ids.device)
        for rotary, layer in zip(layout.rotary, cache.layers, strict=True):
            if rotary:
                layer.keys[:, :, run.slice] = rotate(layer.keys[:, :, run.slice], delta, inv_freq, layout.pairing)
    _remake_layer_0(
        model, cache, tokens, suffix, tuple(sorted((*blank, *(s for s in steered if s.start >= suffix.start))))
    )
    return sum(state_bytes(read(cache, run)) for run in moved)


def _remake_layer_0(model: nn.Module, cache: Cache, tokens: Tokens, suffix: Span, steered: tuple[Span, ...]) -> None:
    """Compute layer 0's keys of live tokens anew where they are now.

    They depend on token and position alone. A rounded key that was rotated and rounded again is not what the model would
    compute, which wrecks models with large key biases in layer 0 (Qwen2.5: 354); the other layers' are much smaller. Steered
    slots have ids that stand in for others, so their keys stay as they were moved.
    """
    layer, chunk = cache.layers[0], prefill_chunk(tokens.ids.device)
    for run in gaps(steered, suffix.end, suffix.start):
        for start in range(run.start, run.end, chunk):
            part = Span(start, min(start + chunk, run.end))
            layer.keys[:, :, part.slice] = look(model, cache, tokens, part, 0)[0]
