"""What the connector must find in vLLM's settings before it serves: a cache that it can exchange states with, an eraser that fits.

Knows: vLLM's configuration. Does not know about requests or the store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kveraser.engines.vllm.server.entries import Geometry
from kveraser.engines.vllm.server.looking import Looking
from kveraser.engines.vllm.server.store import EditStore
from kveraser.eraser.config import FILE_NAME, EraserConfig
from kveraser.errors import EraserMismatchError, OptionError, UnsupportedCacheError
from kveraser.model.view import key_biases
from kveraser.readers.observing import query_norms

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_SHAPE_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "vocab_size")  # fmt: skip
_CONTEXT_PARALLEL = ("decode_context_parallel_size", "prefill_context_parallel_size")


def check_cache(config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """The block size of a cache whose states can be exchanged.

    Raises:
        UnsupportedCacheError: any other cache.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    problem = None
    if len(specs) != 1 or type(specs[0]) is not FullAttentionSpec:
        problem = f"its layers use {', '.join(type(spec).__name__ for spec in specs)}, one group of FullAttentionSpec is needed"
    elif specs[0].sliding_window or specs[0].attention_chunk_size:
        problem = "some layers attend to a sliding window or to chunks"
    elif config.cache_config.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch.")):
        problem = f"its KV cache is quantised ({config.cache_config.cache_dtype})"
    elif config.speculative_config is not None:
        problem = "a draft model has states of its own"
    elif any(getattr(config.parallel_config, name, 1) > 1 for name in _CONTEXT_PARALLEL):
        problem = "the context is split over processes (context parallel)"
    if problem:
        raise UnsupportedCacheError(f"states of {config.model_config.model} cannot be exchanged: {problem}")
    return int(specs[0].block_size)


def check_adapters(config: VllmConfig) -> None:
    """Refuse a CPU server without an empty adapter slot.

    In a batch of requests with and without adapter, vLLM's CPU operations look up "no adapter" as slot -1, which is the
    last one. Unless that one is empty, plain requests are answered with it.
    """
    lora = config.lora_config
    if lora is not None and lora.max_loras < 2 and current_platform.is_cpu():
        raise OptionError(
            f"max_loras is {lora.max_loras}: on a CPU vLLM applies the last adapter slot to requests without one; start "
            "it with --max-loras 2 (one more than there are adapters), so that this slot is empty"
        )


def geometry_of(config: VllmConfig) -> Geometry:
    """What the states of the engine's model look like."""
    model = config.model_config
    shape = {key: getattr(model.hf_text_config, key, None) for key in _SHAPE_KEYS}
    # The rotary configuration is part of it: keys rotated otherwise look the same and are wrong.
    shape["rope"] = str(getattr(model.hf_text_config, "rope_parameters", None))
    known = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Geometry(
        model=f"{Path(str(model.model)).name}-{known}",
        dtype=str(model.dtype).removeprefix("torch."),
        layers=int(model.hf_text_config.num_hidden_layers),
        kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.get_head_size()),
    )


def about_eraser(config: VllmConfig, eraser: str | None) -> dict[str, Any]:
    """What a session has to know: the eraser's window and repair (checked against the model's shape), and whether closing a gap, for which
    keys are rotated once more, costs little: where these are not rounded, or have no bias that would make rounding dear."""
    about: dict[str, Any] = {"max_tokens": config.model_config.max_model_len, "window": None, "repair": 0}
    if eraser is None:
        return about
    settings = EraserConfig.read(Path(eraser) / FILE_NAME)
    settings.check_plain(Path(eraser))
    for key, value in settings.fingerprint.shape.items():
        mine = getattr(config.model_config.hf_text_config, key, None)
        if mine != value:
            raise EraserMismatchError(
                f"the eraser in {eraser} was made for a model with {key} {value}, this one has {mine}"
            )
    about["close_gaps"] = config.model_config.dtype == torch.float32 or not key_biases(_hollow(config))
    about.update(window=settings.window and list(settings.window), repair=settings.repair_next)
    return about


def looking_at(store: EditStore, config: VllmConfig, eraser: str | None) -> Looking | None:
    """Who tells readers of the engine's model; None without an eraser, by whose fingerprint the model is known, and for models
    that normalise queries, whose norm is not at hand here."""
    if eraser is None:
        return None
    if query_norms(_hollow(config)):
        return None
    split = (
        config.parallel_config.tensor_parallel_size > store.geometry.kv_heads
    )  # then a key head's queries are in several
    heads = 0 if split else int(config.model_config.hf_text_config.num_attention_heads)
    return Looking(store, Path(eraser), EraserConfig.read(Path(eraser) / FILE_NAME), heads)


def _hollow(config: VllmConfig) -> torch.nn.Module:
    """The modules of the engine's model, as transformers has them, without weights."""
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config.model_config.hf_text_config)
    return model
