"""Views of a model: other modules, another attention, and the user's own left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import FalconConfig, GPTBigCodeConfig

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, relative, states, tiny, token_ids
from kveraser.model.view import frozen, key_biases, kv_shape, view


class Doubled(nn.Module):
    def forward(self, hidden):
        return 2 * self.base_layer(hidden)


def test_a_view_copies_only_what_it_must():
    model = tiny()
    replaced = view(model, {"model.layers.1.mlp.down_proj": Doubled()})
    own, theirs = dict(replaced.named_modules()), dict(model.named_modules())
    assert own["model.layers.1.mlp.down_proj.base_layer"] is not None
    assert own["model.layers.1"] is not theirs["model.layers.1"]
    assert own["model.layers.0"] is theirs["model.layers.0"]
    assert view(model) is model


def test_a_view_of_a_model_in_training_is_in_eval_mode():
    model = build(make_config("llama")).train()
    assert not any(module.training for module in view(model).modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_can_use_another_attention_than_the_model(family):
    model, ids = tiny(family), token_ids(12)
    eager = view(model, attention="eager")
    assert eager.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert all(module.config is eager.config for module in eager.modules() if hasattr(module, "config"))
    with torch.no_grad():
        torch.testing.assert_close(eager(ids).logits, model(ids).logits)


def test_a_frozen_view_takes_no_gradients_and_shares_the_memory():
    model = build(make_config("llama"))
    own = frozen(model)
    assert not any(parameter.requires_grad for parameter in own.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for mine, theirs in zip(own.parameters(), model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize(("family", "has"), [("llama", False), ("qwen2", True), ("qwen3", False), ("gpt_neox", True)])
def test_the_biases_of_keys_are_found_where_a_family_has_them(family, has):
    assert bool(key_biases(tiny(family))) is has


_SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KEY_HEADS = {
    "falcon, one key head": FalconConfig(**_SMALL),
    "falcon, new architecture": FalconConfig(**_SMALL, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, all key heads": FalconConfig(**_SMALL, multi_query=False),
    "gpt-bigcode": GPTBigCodeConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("kind", KEY_HEADS)
def test_key_heads_are_counted_as_the_cache_has_them(kind):
    model, ids = build(KEY_HEADS[kind]), token_ids(20)
    cache = prefill(model, ids)
    keys = cache.layers[0].keys
    assert kv_shape(model) == (len(cache.layers), keys.shape[1], keys.shape[-1])
    receipt = kv.erase(model, cache, ids, kv.Span(5, 9), "full-recompute")
    assert relative(states(cache), states(prefill(model, receipt.token_ids(ids)))) < 1e-5


@pytest.mark.parametrize("method", ["kveraser", "attention-guided-repair", "selective-recompute"])
def test_a_model_with_attention_of_its_own_is_refused_by_name_where_single_tokens_must_run_again(method):
    model, ids = build(KEY_HEADS["falcon, one key head"]), token_ids(400)
    cache = prefill(model, ids)
    before = [tensor.clone() for tensor in states(cache)]
    with pytest.raises(
        (kv.UnsupportedCacheError, kv.CalibrationError),
        match="FalconForCausalLM does not use transformers' attention interface",
    ):
        kv.erase(model, cache, ids, kv.Span(50, 60), method)
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
