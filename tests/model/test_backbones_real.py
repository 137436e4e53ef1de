"""The real Qwen backbones, by name: `make test-backbones`."""

from __future__ import annotations

import pytest

import kveraser as kv

pytestmark = pytest.mark.backbones


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"])
def test_a_backbone_loaded_by_name_knows_the_capital_of_france(name):
    model, tokenizer = kv.load_backbone(name)
    ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.input_ids.shape[1] :])
