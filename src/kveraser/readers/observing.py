"""Listening to a forward: the queries of its layers, and the keys and values they met.

Knows: transformers' attention interface, query norms. Does not know what the queries are good for.

The model is run through a view whose attention function also keeps what it is given. Queries are taken as they are used
(rotated, normalised); where a model normalises them, also as they were before that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kveraser.errors import CalibrationError
from kveraser.model.attention import check_plain_scores
from kveraser.model.kernels import without_cudnn
from kveraser.model.view import causal_lm, decoder, model_device, view

_OBSERVING = "kveraser_observing"


@dataclass
class Layer:
    """What one layer did with the tokens of a forward; `queries` `(heads, tokens, head_dim)` are the rotated ones."""

    queries: Tensor
    scaling: float


@dataclass
class Observed:
    """What a forward over `(1, tokens)` ids showed.

    Attributes:
        layers: layer index -> its queries.
        unnormed: layer index -> what went into its query norm, `(tokens, ...)`, for models that have one.
        cache: the keys and values, of every layer.
    """

    cache: DynamicCache
    layers: dict[int, Layer] = field(default_factory=dict)
    unnormed: dict[int, Tensor] = field(default_factory=dict)


_observed: ContextVar[Observed | None] = ContextVar("observed", default=None)


def _observing_attention(module: nn.Module, query: Tensor, *seen_by: Any, **options: Any) -> tuple[Tensor, None]:
    check_plain_scores(module, options, "it cannot be told who reads what; use full-recompute or delete-and-shift")
    seen = _observed.get()
    if seen is not None:
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        seen.layers[int(module.layer_idx)] = Layer(query[0].detach(), scaling)  # type: ignore[arg-type]
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, *seen_by, **options)
    return result


AttentionInterface.register(_OBSERVING, _observing_attention)
AttentionMaskInterface.register(_OBSERVING, sdpa_mask)


class _Before(nn.Module):
    """Stands in the place of a query norm in a view, and keeps what goes in."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, hidden: Tensor) -> Tensor:
        self.keep(hidden[0].detach())
        result: Tensor = self.base_layer(hidden)  # type: ignore[operator]
        return result


def query_norms(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Layer index -> name and module of the norm of its queries, for models that have one."""
    return {
        int(module.layer_idx): (f"{name}.q_norm", module.q_norm)
        for name, module in causal_lm(model).named_modules()
        if hasattr(module, "layer_idx") and isinstance(getattr(module, "q_norm", None), nn.Module)
    }


@torch.no_grad()
def observe(model: nn.Module, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Observed:
    """Run `(1, tokens)` ids and listen.

    Args:
        positions: `(1, tokens)`; None counts from 0.
        mask: `(1, 1, tokens, tokens)`, added to attention scores; None is causal.

    Raises:
        CalibrationError: the model's attention cannot be listened to (it does not use transformers' interface).
    """
    seen = Observed(DynamicCache())

    def keeping(layer: int) -> Callable[[Tensor], None]:
        return lambda hidden: seen.unnormed.__setitem__(layer, hidden)

    norms = {name: _Before(keeping(layer)) for layer, (name, _) in query_norms(model).items()}
    body = decoder(view(causal_lm(model), norms, attention=_OBSERVING))
    if positions is None:
        positions = torch.arange(ids.shape[1], device=model_device(model))[None]
    token = _observed.set(seen)
    try:
        with without_cudnn():
            body(
                input_ids=ids, position_ids=positions, past_key_values=seen.cache, attention_mask=mask, use_cache=True
            )  # fmt: skip
    finally:
        _observed.reset(token)
    if len(seen.layers) != len(seen.cache.layers):
        raise CalibrationError(
            f"{type(causal_lm(model)).__name__} does not use transformers' attention interface in every layer, so its "
            "queries cannot be observed; use choose='next'"
        )
    return seen
