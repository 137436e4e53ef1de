"""Adapters as the paper's authors publish theirs: a plain PEFT LoRA without `kveraser.json`, in either layout of names."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import kveraser as kv
from conftest import build, make_config, prefill, random_eraser, same, states, tiny, token_ids
from kveraser.eraser.injection import lora_layers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def published(folder, model, *, below_the_head):
    """An eraser's folder as the authors write it; returns the eraser."""
    eraser = random_eraser(model)
    assert {name.rpartition(".")[2] for name in eraser.layers} == set(PROJECTIONS)
    folder.mkdir()
    eraser.lora_config.save_pretrained(str(folder))
    shorter = ("base_model.model.model.", "base_model.model.") if below_the_head else ("", "")
    weights = {name.replace(*shorter, 1): tensor for name, tensor in eraser.state_dict().items()}
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return eraser


@pytest.mark.parametrize("below_the_head", [True, False], ids=["as AutoModel", "as the causal model"])
def test_an_adapter_without_kveraser_json_is_taken_with_the_papers_settings_and_a_warning(tmp_path, below_the_head):
    model = tiny("qwen3")
    eraser = published(tmp_path / "adapter", model, below_the_head=below_the_head)
    with pytest.warns(UserWarning, match="nothing says which model it was made for"):
        loaded = kv.KVEraser.from_pretrained(tmp_path / "adapter", model)
    assert (loaded.window, loaded.repair, loaded.kind) == (None, 0, "trained")
    ids = token_ids(30)
    results = []
    for used in (eraser, loaded):
        cache = prefill(model, ids)
        receipt = kv.erase(model, cache, ids, kv.Span(8, 15), kv.Steering(used, full_prefix=True, repair=0))
        assert receipt.tokens_recomputed == 7
        results.append(states(cache))
    assert same(*results)


def test_readers_are_recomputed_with_such_an_adapter_when_asked_for(tmp_path):
    model = tiny("qwen3")
    published(tmp_path / "adapter", model, below_the_head=True)
    with pytest.warns(UserWarning, match="repair=70"):
        loaded = kv.KVEraser.from_pretrained(tmp_path / "adapter", model)
    ids = token_ids(30)
    receipt = kv.erase(model, prefill(model, ids), ids, kv.Span(8, 15), kv.Steering(loaded, repair=4))
    assert receipt.tokens_recomputed == 7 + 4


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    published(tmp_path / "adapter", tiny("qwen3"), below_the_head=True)
    with (
        pytest.warns(UserWarning, match="kveraser.json"),
        pytest.raises(kv.EraserMismatchError, match="too many for this model"),
    ):
        kv.KVEraser.from_pretrained(tmp_path / "adapter", build(make_config("qwen3", num_hidden_layers=2)))


def test_a_folder_without_any_adapter_is_refused(tmp_path):
    with pytest.raises(kv.EraserMismatchError, match="neither a kveraser.json nor an adapter_config.json"):
        kv.KVEraser.from_pretrained(tmp_path, tiny())


def test_the_names_and_shapes_of_the_published_adapter_are_those_of_qwen3_8b():
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
        layers = lora_layers(model, LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
    assert len(layers) == 36 * 7
    assert sum(layer.down.numel() + layer.up.numel() for layer in layers.values()) == 43_646_976
    first = layers["model.layers.0.mlp.down_proj"]
    assert (tuple(first.down.shape), tuple(first.up.shape)) == ((16, 12288), (4096, 16))
