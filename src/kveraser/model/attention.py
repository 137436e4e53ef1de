"""Attention of our own: for CPUs, where transformers' `sdpa` is slow, and for tokens that see what no mask can say.

Knows: queries, keys, values, transformers' attention interface. Does not know about caches, contexts or erasing.

The query heads of a group read the same keys and values, so they can be rows of one matrix product.

- *One new token* in half precision: a product of a single row is very slow, and `sdpa` does one per query head. The heads
  of a group as rows give the same result but for the last bit (mostly that, too), in a fifth of the time at 8K tokens.
- *Told by the keys*: tokens that are run again each see slots of their own, as if others were not there (`cache.repair`).
- *An explicit mask*: the fused kernel computes every score anyway, and is slower than two plain products: 2.2 against 1.5 ms
  for 96 queries on 612 keys, and twice slower forward and backward for 400 on 800. Half-precision scores are rounded, though.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kveraser.errors import UnsupportedCacheError
from kveraser.model.view import causal_lm, evaluating, frozen, model_device, model_dtype, text_config, view

_DECODING, _GROUPED, _MASKED = "kveraser_decoding", "kveraser_grouped", "kveraser_masked"
_TOLD = "kveraser_told"
_MOST_SCORES = 1 << 24
"""Attention scores that are held at a time."""
_MOST_SLOTS = 2048
"""Beyond, the scores of plain products no longer fit a CPU's caches."""
_CHANGING_SCORES = ("softcap", "s_aux", "position_bias")
"""Options of transformers' attention functions that change the scores."""


def decoding_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Softmax attention, fast for one new token; arguments as of `grouped_attention`."""
    heads, tokens = query.shape[1:3]
    groups = key.shape[1]
    if tokens > 1 or groups == heads or attention_mask is not None or options.get("dropout"):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    return one_token_attention(query, key, value, options.get("scaling")), None


def one_token_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Softmax attention of one token, `(batch, heads, 1, head_dim)`, that sees all slots; `(batch, 1, heads, head_dim)`."""
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    rows = query.reshape(batch, groups, heads // groups, size)
    found = F.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return found.reshape(batch, 1, heads, size)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention by two plain products per head group.

    Args:
        query: `(batch, heads, tokens, head_dim)`.
        key, value: `(batch, kv_heads, slots, head_dim)`.
        attention_mask: `(batch, 1, tokens, slots)`, added to the scores; None masks nothing.
        scaling: of the scores; None for `head_dim ** -0.5`.
        options: others of transformers' attention functions; not used.

    Returns:
        `(batch, tokens, heads, head_dim)`, and no attention weights.
    """
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    grouped = (query * scale).reshape(batch, groups, heads // groups * tokens, size)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, tokens, -1)
    if attention_mask is not None:
        scores += attention_mask
    weights = torch.softmax(scores, -1).view(batch, groups, heads // groups * tokens, -1)
    return (weights @ value).view(batch, heads, tokens, size).transpose(1, 2), None


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`grouped_attention` for up to 2,048 slots, else transformers' `sdpa`."""
    if attention_mask is not None and key.shape[-2] <= _MOST_SLOTS:
        return grouped_attention(module, query, key, value, attention_mask, **options)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


def blockwise_attention(
    blocks: Sequence[tuple[Tensor, Tensor]], value: Tensor, hide: Callable[[Tensor, slice], object]
) -> Tensor:
    """Softmax attention in which each block of slots has queries of its own; scores are float32, some rows at a time.

    Args:
        blocks: for consecutive blocks of slots, `(batch, heads, tokens, head_dim)` scaled queries and
            `(batch, kv_heads, slots, head_dim)` keys, both float32.
        value: `(batch, kv_heads, all slots, head_dim)`.
        hide: changes the scores `(batch, heads, rows, all slots)` of a range of tokens in place, so that what is not to be seen is not.

    Returns:
        `(batch, heads, tokens, head_dim)`, in the type of the values.
    """
    batch, groups, length, size = value.shape
    heads, count = blocks[0][0].shape[1:3]
    step = max(_MOST_SCORES // (heads * length), 1)
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores = [query[:, :, rows].reshape(batch, groups, -1, size) @ keys.transpose(-1, -2) for query, keys in blocks]
        found = (scores[0] if len(scores) == 1 else torch.cat(scores, -1)).view(batch, heads, -1, length)
        hide(found, rows)
        weights = found.softmax(-1).to(value.dtype).view(batch, groups, -1, length)
        parts.append((weights @ value).view(batch, heads, -1, size))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def check_plain_scores(module: nn.Module, options: Mapping[str, Any], remedy: str) -> None:
    """Raise unless attention is plain softmax attention, the only one that there is a function of our own for.

    Args:
        options: of transformers' attention functions.
        remedy: what cannot be done then, and what to do.

    Raises:
        UnsupportedCacheError: the model changes the scores.
    """
    changing = [name for name in _CHANGING_SCORES if options.get(name) is not None]
    if changing:
        raise UnsupportedCacheError(
            f"{type(module).__name__} changes attention scores ({', '.join(changing)}), so {remedy}"
        )


def told_attention(module: nn.Module, query: Tensor, key: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention as the keys say: they come from a pass that knows what each token sees, and carry its `attend`.

    Raises:
        UnsupportedCacheError: scores that are not those of plain softmax attention.
    """
    check_plain_scores(module, options, "single tokens cannot be run again; use full-recompute or delete-and-shift")
    scaling = options.get("scaling")
    attend: Any = key.attend  # type: ignore[attr-defined]
    return attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(_DECODING, decoding_attention)
AttentionInterface.register(_GROUPED, grouped_attention)
AttentionInterface.register(_MASKED, masked_attention)
AttentionInterface.register(_TOLD, told_attention)
AttentionMaskInterface.register(_DECODING, sdpa_mask)
AttentionMaskInterface.register(_TOLD, lambda *_, **__: None)


def _on_cpu_by_sdpa(model: nn.Module) -> bool:
    return model_device(model).type == "cpu" and text_config(model)._attn_implementation == "sdpa"


def _in_half_precision(model: nn.Module) -> bool:
    return model_dtype(model) in (torch.bfloat16, torch.float16)


def for_decoding(model: nn.Module) -> Any:
    """The model in eval mode, or a view of it that decodes faster."""
    if _on_cpu_by_sdpa(model) and _in_half_precision(model):
        return view(causal_lm(model), attention=_DECODING)
    return evaluating(model)


def for_masks(model: nn.Module) -> Any:
    """The model, or a view of it that takes 4-D masks (and where that pays, faster)."""
    if _on_cpu_by_sdpa(model) and _in_half_precision(model):
        return view(causal_lm(model), attention=_MASKED)
    return model if text_config(model)._attn_implementation in ("sdpa", "eager") else view(model, attention="sdpa")


def for_telling(model: nn.Module) -> Any:
    """A view of the model whose attention is what the keys say (`told_attention`).

    Raises:
        UnsupportedCacheError: the model does not use transformers' attention interface.
    """
    base = causal_lm(model)
    if not getattr(base, "_supports_attention_backend", True):
        raise UnsupportedCacheError(
            f"{type(base).__name__} does not use transformers' attention interface, so single tokens cannot be run again; use "
            "full-recompute or delete-and-shift"
        )
    return view(base, attention=_TOLD)


def for_packing(model: nn.Module) -> Any:
    """A frozen view of a model that runs packed rows fast, also backward; the model stays as it is."""
    return frozen(causal_lm(model), attention=_GROUPED if _on_cpu_by_sdpa(model) else None)
