"""Surgery on transformers caches: read, write, cut and truncate slots, in all layers at once.

Knows: `DynamicLayer` and `GrowableLayer` tensors `(batch, kv_heads, tokens, head_dim)`. Does not know about models or
about what the states mean. Every function changes all layers or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.cache.growable import GrowableLayer
from kveraser.cache.support import writing
from kveraser.cache.tokens import slots_of
from kveraser.spans import Span, gaps

States = list[tuple[Tensor, Tensor]]
"""Keys and values of some slots, one pair `(batch, kv_heads, tokens, head_dim)` per layer."""


def cache_length(cache: Cache) -> int:
    """Number of slots."""
    return int(cache.get_seq_length())


def read(cache: Cache, span: Span) -> States:
    """Views of the states in `span`."""
    return [(layer.keys[:, :, span.slice], layer.values[:, :, span.slice]) for layer in cache.layers]


def snapshot(cache: Cache, span: Span) -> States:
    """Copies of the states in `span`."""
    with writing(cache):
        return [(keys.clone(), values.clone()) for keys, values in read(cache, span)]


def snapshots(cache: Cache, spans: Sequence[Span]) -> list[States]:
    """Copies of the states in each of some spans; one copy per layer, since an accelerator takes as long for a small one."""
    if len(spans) < 2:
        return [snapshot(cache, span) for span in spans]
    slots, sizes = slots_of(spans, cache.layers[0].keys.device), list(map(len, spans))
    with writing(cache):
        taken = [
            [states.index_select(2, slots).split(sizes, 2) for states in (layer.keys, layer.values)]
            for layer in cache.layers
        ]
        return [[(keys[index], values[index]) for keys, values in taken] for index in range(len(spans))]


def write(cache: Cache, start: int, states: States) -> int:
    """Overwrite slots from `start` on with `states`, in place; returns the bytes written."""
    written = 0
    with writing(cache):
        for layer, (keys, values) in zip(cache.layers, states, strict=True):
            end = start + keys.shape[-2]
            layer.keys[:, :, start:end] = keys
            layer.values[:, :, start:end] = values
            written += state_bytes([(keys, values)])
    return written


def write_all(cache: Cache, regions: Sequence[tuple[Span, States]]) -> None:
    """Overwrite disjoint spans with states, in place, as `snapshots` gives them."""
    if len(regions) < 2:
        for span, states in regions:
            write(cache, span.start, states)
        return
    slots = slots_of((span for span, _ in regions), cache.layers[0].keys.device)
    with writing(cache):
        for index, layer in enumerate(cache.layers):
            for part, states in enumerate((layer.keys, layer.values)):
                states.index_copy_(2, slots, torch.cat([kept[index][part] for _, kept in regions], 2))


def append(cache: Cache, states: States) -> None:
    """Add slots at the end."""
    with writing(cache):
        if all(isinstance(layer, GrowableLayer) for layer in cache.layers):
            for layer, (keys, values) in zip(cache.layers, states, strict=True):
                layer.reserve(layer.get_seq_length() + keys.shape[-2], keys, values)
            for layer, (keys, values) in zip(cache.layers, states, strict=True):
                layer.update(keys, values)
            return
        joined = [
            (torch.cat([layer.keys, keys], -2), torch.cat([layer.values, values], -2))
            for layer, (keys, values) in zip(cache.layers, states, strict=True)
        ]
        _assign(cache, joined)


def cut(cache: Cache, spans: tuple[Span, ...]) -> None:
    """Remove the slots `spans` (sorted, disjoint); the slots behind them move up. Keys are not re-rotated."""
    length = cache_length(cache)
    kept = gaps(spans, length)
    if not spans:
        return
    first = spans[0].start
    with writing(cache):
        if all(isinstance(layer, GrowableLayer) for layer in cache.layers):
            for layer in cache.layers:
                at = first
                for run in gaps(spans, length, first):
                    for states in (layer.keys, layer.values):
                        states[:, :, at : at + len(run)] = states[:, :, run.slice].clone()
                    at += len(run)
            truncate(cache, length - sum(len(span) for span in spans))
            return
        joined = []
        for layer in cache.layers:
            pair = [torch.cat([states[:, :, run.slice] for run in kept], -2) if kept else states[:, :, :0]
                    for states in (layer.keys, layer.values)]  # fmt: skip
            joined.append((pair[0], pair[1]))
        _assign(cache, joined)


def spread(cache: Cache, blank: tuple[Span, ...]) -> None:
    """Make room of zeros (sorted, disjoint slots as they are then); the slots behind it move down. Keys are not re-rotated."""
    first, length = blank[0].start, cache_length(cache)
    whole = length + sum(len(room) for room in blank)
    with writing(cache):
        held, at, states = snapshot(cache, Span(first, length)) if first < length else [], 0, []
        runs = sorted([*((room, True) for room in blank), *((run, False) for run in gaps(blank, whole, first))])
        for keys, values in held:
            at, parts = 0, []
            for run, empty in runs:
                if empty:
                    parts.append(
                        [part.new_zeros((*part.shape[:2], len(run), part.shape[3])) for part in (keys, values)]
                    )
                else:
                    parts.append([part[:, :, at : at + len(run)] for part in (keys, values)])
                    at += len(run)
            states.append((torch.cat([keys for keys, _ in parts], -2), torch.cat([values for _, values in parts], -2)))
        truncate(cache, first)
        append(cache, states)


def truncate(cache: Cache, length: int) -> None:
    """Keep the first `length` slots; nothing is copied. A pass that was interrupted may have reached only some of the layers."""
    for layer in cache.layers:
        if (drop := int(layer.get_seq_length()) - length) > 0:
            layer.crop(-drop)


def state_bytes(states: States) -> int:
    """Bytes of the given states."""
    return sum(tensor.numel() * tensor.element_size() for pair in states for tensor in pair)


def _assign(cache: Cache, states: States) -> None:
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        assert isinstance(layer, DynamicLayer)
        layer.keys, layer.values = keys, values
