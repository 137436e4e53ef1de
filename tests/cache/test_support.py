"""What cannot be edited is refused by name, with what to do, and stays as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, Gemma3TextConfig, MistralConfig, Qwen3NextConfig, T5Config
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, EncoderDecoderCache, StaticCache

import kveraser as kv
from conftest import build, make_config, prefill, same, states, tiny, token_ids
from kveraser.cache import check_cache, check_model

REMEDY = "process the shortened context|instead|load|move|run"


class Configured:
    """Stands for a model whose weights do not matter here."""

    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MistralConfig(sliding_window=64), "sliding-window"),
        (Gemma3TextConfig(num_hidden_layers=6), "sliding-window"),
        (Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (T5Config(), "cross-attention"),
        (make_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic-NTK"),
        (
            make_config(
                "phi3",
                rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                 "original_max_position_embeddings": 32},
            ),
            "LongRoPE",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_edited_are_refused_by_name(config, name):
    with pytest.raises(kv.UnsupportedCacheError, match=name) as caught:
        check_model(Configured(config))
    assert "instead" in str(caught.value)


@pytest.mark.parametrize("method", list(kv.methods()))
def test_a_dynamic_ntk_model_is_refused_by_every_method_but_no_erase(method):
    model = build(make_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    ids = token_ids(12)
    cache = prefill(model, ids)
    before = states(cache)
    if method == "no-erase":
        kv.erase(model, cache, ids, kv.Span(2, 4), method=method)
    else:
        with pytest.raises(kv.UnsupportedCacheError, match="dynamic-NTK"):
            kv.erase(model, cache, ids, kv.Span(2, 4), method=method)
    assert same(states(cache), before)


def _quantised():
    class QuantizedLayerOfSomeKind(DynamicSlidingWindowLayer.__mro__[1]):
        pass

    cache = DynamicCache()
    cache.layers.append(QuantizedLayerOfSomeKind())
    return cache


def _linear():
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

    cache = DynamicCache()
    cache.layers.append(LinearAttentionAndFullAttentionLayer())
    return cache


def _sliding():
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    return cache


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (_sliding(), "DynamicSlidingWindowLayer.*sliding-window"),
        (_quantised(), "quantised"),
        (_linear(), "linear-attention"),
        (StaticCache(make_config("llama"), max_cache_len=8), "StaticCache"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "cross-attention"),
        (((torch.zeros(1), torch.zeros(1)),), "DynamicCache"),
    ],
    ids=["sliding", "quantised", "linear", "static", "cross", "tuple"],
)
def test_caches_that_cannot_be_edited_are_refused_by_name(cache, name):
    with pytest.raises(kv.UnsupportedCacheError, match=name):
        check_cache(cache)


def test_an_empty_cache_is_refused():
    with pytest.raises(kv.CacheMismatchError, match="empty"):
        check_cache(DynamicCache())


@pytest.mark.parametrize("other", ["layers", "heads"])
def test_a_cache_of_another_model_is_refused(other):
    model, ids = tiny(), token_ids(9)
    foreign = build(make_config("llama", num_hidden_layers=2)) if other == "layers" else tiny("llama", 4)
    with pytest.raises(kv.CacheMismatchError, match="layers" if other == "layers" else "KV heads"):
        kv.erase(model, prefill(foreign, ids), ids, kv.Span(1, 2), method="full-recompute")


def test_a_model_on_another_device_is_refused():
    model, ids = tiny(), token_ids(9)
    cache = prefill(model, ids)
    elsewhere = build(make_config("llama")).to("meta")
    before = states(cache)
    with pytest.raises(kv.CacheMismatchError, match="cpu and the model on meta"):
        kv.erase(elsewhere, cache, ids, kv.Span(1, 2), method="full-recompute")
    assert same(states(cache), before)


@pytest.mark.parametrize("method", list(kv.methods()))
def test_caches_made_under_inference_mode_work(method):
    from conftest import random_eraser

    model, ids = tiny(), token_ids(20)
    with torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
    assert cache.layers[0].keys.is_inference()
    before = states(cache)
    receipt = kv.erase(model, cache, ids, kv.Span(4, 9), method=method, eraser=random_eraser(model))
    with torch.no_grad():
        model(token_ids(2), past_key_values=cache)
    cache.crop(-2)
    kv.restore(cache, receipt)
    assert same(states(cache), before)
