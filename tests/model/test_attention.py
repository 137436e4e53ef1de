"""Attention of one new token, grouped by key head."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kveraser as kv
from conftest import FAMILIES, tiny, token_ids
from kveraser.model import attention


@pytest.mark.parametrize(("tokens", "heads", "groups"), [(1, 8, 2), (1, 4, 4), (1, 6, 1), (5, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_attention_of_transformers(tokens, heads, groups, dtype):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // groups, True
    query = torch.randn(2, heads, tokens, 16).to(dtype)
    key, value = (torch.randn(2, groups, 40, 16).to(dtype) for _ in range(2))
    ours, _ = attention.decoding_attention(module, query, key, value, None, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    assert ours.shape == theirs.shape == (2, tokens, heads, 16)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_in_half_precision_decodes_by_it_and_leaves_the_model_alone(family, monkeypatch):
    model = tiny(family, dtype=torch.bfloat16)
    rows = []
    real = torch.nn.functional.scaled_dot_product_attention

    def seen(query, *arguments, **options):
        rows.append(tuple(query.shape))
        return real(query, *arguments, **options)

    context = kv.ErasableContext(model)
    context.append_ids(token_ids(20)[0])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    said = context.generate_ids(token_ids(3)[0], max_new_tokens=4)
    assert len(said) <= 4
    grouped = model.config.num_attention_heads != getattr(model.config, "num_key_value_heads", None)
    if grouped and family != "gpt_neox":
        assert any(shape[1] == model.config.num_key_value_heads and shape[2] > 1 for shape in rows)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_full_precision_uses_the_model_as_it_is():
    assert attention.for_decoding(tiny()) is tiny()
