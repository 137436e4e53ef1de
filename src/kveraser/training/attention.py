"""Attention for packed rows on a CPU: two plain matrix products per head group.

Knows: queries, keys, values, a 4-D mask. Does not know about models.

With an explicit mask, the fused kernels of CPUs compute every score anyway, and are twice slower than two matrix products
forward and backward (400 queries, 800 keys, bfloat16). Queries that share a key head go into one product, so that keys
and values are not repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kveraser.model_view import causal_lm, frozen, model_device, text_config

_NAME = "kveraser_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention.

    Args:
        query: `(batch, heads, tokens, head_dim)`.
        key, value: `(batch, kv_heads, slots, head_dim)`.
        attention_mask: `(batch, 1, tokens, slots)`, added to the scores.

    Returns:
        `(batch, tokens, heads, head_dim)`, and no attention weights.
    """
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    grouped = (query * scale).reshape(batch, groups, heads // groups * tokens, size)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, tokens, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1).view(batch, groups, heads // groups * tokens, -1)
    return (weights @ value).view(batch, heads, tokens, size).transpose(1, 2), None


def for_packing(model: nn.Module) -> Any:
    """A frozen view of a model that runs packed rows fast; the model and its configuration stay as they are."""
    base = causal_lm(model)
    if model_device(model).type != "cpu" or text_config(model)._attn_implementation != "sdpa":
        return frozen(base)
    AttentionInterface.register(_NAME, grouped_attention)
    return frozen(base, attention=_NAME)
