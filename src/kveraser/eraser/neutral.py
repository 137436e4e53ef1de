"""Neutral states: written, not run, where nothing shall be attended to.

Knows: caches, neutral keys. Does not know how these keys were found (`readers.neutral_keys`), or which slots they go to.

A slot with a key that no query likes and a value of zero is as good as masked, for models and generation loops that know
nothing of masks. The key is turned to the last position of the context: queries from there on were part of its fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kveraser.cache import Tokens, state_bytes, writing
from kveraser.readers import Turning
from kveraser.spans import Span


@torch.no_grad()
def write_neutral(model: nn.Module, cache: Cache, tokens: Tokens, spans: Sequence[Span], keys: Tensor) -> int:
    """Hide the slots `spans`; returns the bytes written.

    Args:
        keys: `(layers, kv_heads, head_dim)`, as at position 0.
    """
    last = tokens.position(Span(tokens.length - 1, tokens.length))[:, 0]
    if tokens.mask is not None and tokens.positions is not None:
        last = tokens.positions.masked_fill(tokens.mask == 0, 0).amax(-1)
    turns, written = Turning.of(model).at(last), 0
    with writing(cache):
        for index, (layer, key) in enumerate(zip(cache.layers, keys.to(tokens.ids.device), strict=True)):
            placed = turns.to_place(key[:, None].expand(-1, len(last), -1), index)  # (kv_heads, rows, head_dim)
            placed = placed.transpose(0, 1)[:, :, None]
            for span in spans:
                states = (layer.keys[:, :, span.slice], layer.values[:, :, span.slice])
                states[0][:] = placed.to(states[0].dtype)
                states[1].zero_()
                written += state_bytes([states])
    return written
