"""Moving keys: a moved key equals one that the model computed at the new position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CohereConfig, Glm4Config, GPT2Config, SmolLM3Config
from transformers.cache_utils import DynamicCache

import kveraser as kv
from conftest import FAMILIES, build, make_config, relative, tiny, token_ids
from kveraser.model.rope import frequencies, rotary_layout, rotate

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
}  # fmt: skip


def models():
    yield from ((family, lambda family=family: tiny(family)) for family in FAMILIES)
    for name, scaling in SCALINGS.items():
        config = {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
        yield name, lambda config=config: build(make_config("llama", **config))
    yield "interleaved (cohere)", lambda: build(CohereConfig(**SMALL))
    yield "interleaved, partial (glm4)", lambda: build(Glm4Config(head_dim=8, **SMALL))
    yield "some layers without rotary (smollm3)", lambda: build(SmolLM3Config(no_rope_layers=[1, 0, 1, 1], **SMALL))


@torch.no_grad()
def keys_at(model, ids, start):
    """All layers' keys of one token each, alone at position `start`; the token sees only itself."""
    cache = DynamicCache()
    model(ids.T, position_ids=torch.full((ids.shape[1], 1), start), past_key_values=cache)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize(("name", "make"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_moved_key_equals_one_computed_at_the_new_position(name, make):
    model = make()
    layout, inv_freq = rotary_layout(model), frequencies(model)
    ids = token_ids(6)
    for start, end in ((0, 9), (50, 13), (7, 300)):
        moved = [
            rotate(keys, end - start, inv_freq, layout.pairing) if rotary else keys
            for rotary, keys in zip(layout.rotary, keys_at(model, ids, start), strict=True)
        ]
        assert relative(moved, keys_at(model, ids, end)) < 1e-4


@given(st.integers(-500, 500), st.sampled_from(["halves", "neighbors"]), st.integers(1, 4))
def test_moving_there_and_back_changes_nothing_but_rounding(delta, pairing, half):
    keys = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(delta + 1000))
    inv_freq = 1.0 / 10000 ** (torch.arange(half) / half)
    there = rotate(keys, delta, inv_freq, pairing)
    assert torch.equal(there[..., 2 * half :], keys[..., 2 * half :])
    assert relative([rotate(there, -delta, inv_freq, pairing)], [keys]) < 1e-5
    assert torch.allclose(there.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5)


def test_rows_and_tokens_may_move_by_different_distances():
    keys = torch.randn(2, 3, 4, 8)
    inv_freq = 1.0 / 10000 ** (torch.arange(4) / 4)
    delta = torch.tensor([[1, 2, 3, 4], [0, -1, -2, 50]])
    moved = rotate(keys, delta, inv_freq)
    for row in range(2):
        for token in range(4):
            alone = rotate(keys[row : row + 1, :, token : token + 1], int(delta[row, token]), inv_freq)
            assert torch.allclose(moved[row : row + 1, :, token : token + 1], alone, atol=1e-6)


def test_yarn_keys_keep_their_attention_scaling():
    model = build(make_config("llama", rope_parameters={"rope_theta": 10000.0, **SCALINGS["yarn"]}))
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1.3)
    keys = keys_at(model, token_ids(3), 5)[0]
    moved = rotate(keys, 20, frequencies(model))
    assert torch.allclose(moved.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5)


def test_a_model_without_rotary_positions_is_refused_by_methods_that_move_tokens():
    model = build(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    ids = token_ids(20)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for method in ("delete-and-shift", "local-suffix-repair", "selective-recompute"):
        with pytest.raises(kv.UnsupportedCacheError, match="no rotary position embedding"):
            kv.erase(model, cache, ids, kv.Span(3, 6), method=method)
    assert kv.erase(model, cache, ids, kv.Span(3, 6), method="full-recompute").exact
