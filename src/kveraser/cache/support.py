"""Which models and caches can be edited in place, and what to do about the others.

Knows: transformers' configurations and cache layer types. Does not know about erasing methods.

Editing needs one full-attention K/V pair per layer, whose slot `i` is token `i`. Everything else is refused by name
before anything is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticCache

from kveraser.cache.growable import GrowableLayer
from kveraser.errors import CacheMismatchError, UnsupportedCacheError
from kveraser.model.view import causal_lm, kv_shape, model_device, text_config

_RECOMPUTE = "process the shortened context from the start instead"
_RESCALED_ROPE = {"dynamic": "dynamic-NTK", "longrope": "LongRoPE"}


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (nested or [parameters])}


def check_model(model: nn.Module) -> None:
    """Raise unless the model's attention keeps one editable K/V pair per layer.

    Raises:
        UnsupportedCacheError: sliding-window, chunked, linear-attention, MLA, cross-attention, shared-KV,
            dynamic-NTK or LongRoPE models.
    """
    config = text_config(model)
    name = type(causal_lm(model)).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedCacheError(f"{name} has cross-attention: its decoder sees the source elsewhere; {_RECOMPUTE}")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedCacheError(
            f"{name} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): its cache is no plain "
            f"K/V pair; {_RECOMPUTE}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = sorted(kinds - {"full_attention"})
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and (odd or not getattr(config, "layer_types", None)):
        raise UnsupportedCacheError(
            f"{name} has sliding-window layers (sliding_window={window}): states outside the window are gone and "
            f"cannot be repaired; {_RECOMPUTE}, or load a variant with full attention (sliding_window=None)"
        )
    if odd:
        raise UnsupportedCacheError(
            f"{name} has {', '.join(odd)} layers, only full_attention can be edited; {_RECOMPUTE}"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedCacheError(f"{name} shares keys and values between layers; {_RECOMPUTE}")
    for kind in sorted(_rope_types(config) & set(_RESCALED_ROPE)):
        raise UnsupportedCacheError(
            f"{name} uses {_RESCALED_ROPE[kind]} position scaling: the frequencies change with the context's length, so "
            f"cached and new keys do not match; {_RECOMPUTE}, or load it with default, linear, Llama-3 or YaRN scaling"
        )


def check_cache(cache: Any) -> None:
    """Raise unless `cache` is filled and each of its layers is a plain dynamic one or a `GrowableLayer`.

    Raises:
        UnsupportedCacheError: any other kind of cache, named.
        CacheMismatchError: an empty cache, or layers of different lengths.
    """
    if not isinstance(cache, Cache):
        hint = "; wrap the tuples with transformers.DynamicCache(...)" if isinstance(cache, tuple | list) else ""
        raise UnsupportedCacheError(f"a transformers DynamicCache is needed, got {type(cache).__name__}{hint}")
    if isinstance(cache, EncoderDecoderCache):
        raise UnsupportedCacheError(f"EncoderDecoderCache has cross-attention states; {_RECOMPUTE}")
    if isinstance(cache, StaticCache):
        raise UnsupportedCacheError("StaticCache has fixed slots; prefill into a DynamicCache instead")
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            "an offloading cache keeps its layers elsewhere; use DynamicCache(offloading=False)"
        )
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, GrowableLayer):
            name = type(layer).__name__
            why = (
                "a sliding-window layer" if getattr(layer, "is_sliding", False)
                else "a quantised layer" if "Quant" in name
                else "a linear-attention layer" if "Linear" in name
                else "not a plain key/value layer"
            )  # fmt: skip
            raise UnsupportedCacheError(
                f"layer {index} of the cache is a {name} ({why}); only full-precision, full-attention DynamicCache "
                f"layers can be edited; {_RECOMPUTE}"
            )
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    if not lengths or lengths == {0}:
        raise CacheMismatchError("the cache is empty; run the context through the model first")
    if len(lengths) > 1:
        raise CacheMismatchError(f"the cache's layers hold different numbers of tokens: {sorted(lengths)}")


def check_belongs(model: nn.Module, cache: Cache) -> None:
    """Raise `CacheMismatchError` unless the cache has the model's layers, K/V shape, device and type."""
    layers, heads, head_dim = kv_shape(model)
    keys = cache.layers[0].keys
    if len(cache.layers) != layers:
        raise CacheMismatchError(
            f"the cache has {len(cache.layers)} layers and the model {layers}; is it of another model?"
        )
    if (keys.shape[1], keys.shape[-1]) != (heads, head_dim):
        raise CacheMismatchError(
            f"the cache holds {keys.shape[1]} KV heads of size {keys.shape[-1]}, the model has {heads} of size {head_dim}"
        )
    device = model_device(model)
    if keys.device != device:
        raise CacheMismatchError(f"the cache is on {keys.device} and the model on {device}; move one of them")
    if any(layer.keys.dtype != keys.dtype for layer in cache.layers) or not keys.dtype.is_floating_point:
        raise CacheMismatchError(f"the cache holds {keys.dtype} keys next to other types; one floating type is needed")


def check_editable(model: nn.Module, cache: Any) -> None:
    """All of the above checks; nothing is changed."""
    check_cache(cache)
    check_model(model)
    check_belongs(model, cache)


def writing(cache: Cache) -> torch.inference_mode:
    """A context for editing `cache`: no gradients, and inference mode when the cache was made in inference mode."""
    inference = any(layer.keys is not None and layer.keys.is_inference() for layer in cache.layers)
    return torch.inference_mode() if inference else torch.no_grad()  # type: ignore[return-value]
