"""The start close to neutral: attention to steering states is lowered by what was asked, where that is possible."""

from __future__ import annotations

import pytest
import torch

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, same, states, tiny, token_ids
from kveraser.training.neutral import _against, _one_for_all, hide

POSSIBLE = ("llama", "qwen2", "mistral")


def texts():
    return [token_ids(60, seed=seed)[0].tolist() for seed in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_key_projections_are_changed_and_only_where_it_is_possible(family):
    model = tiny(family)
    before = states(prefill(model, token_ids(20)))
    eraser = kv.KVEraser.new(model, rank=2)
    fresh = {name: parameter.detach().clone() for name, parameter in eraser.named_parameters()}
    assert hide(eraser, model, texts(), 4.0) == (family in POSSIBLE)
    changed = {name for name, parameter in eraser.named_parameters() if not torch.equal(parameter, fresh[name])}
    assert all(".k_proj." in name for name in changed)
    assert bool(changed) == (family in POSSIBLE)
    assert all(torch.equal(p[1:], fresh[n][1:]) for n, p in eraser.named_parameters() if "k_proj.lora_A" in n)
    assert same(before, states(prefill(model, token_ids(20))))


def test_a_constant_is_found_in_what_goes_in():
    inputs = torch.randn(500, 16, dtype=torch.float64) * 0.3 + torch.linspace(1, 2, 16, dtype=torch.float64)
    products = inputs @ _one_for_all(inputs)
    assert products.mean().item() == pytest.approx(1.0)
    assert products.std().item() < 0.1


@pytest.mark.parametrize("nats", [1.0, 6.0])
def test_scores_are_lowered_in_every_head_of_a_group(nats):
    means = torch.randn(3, 32, dtype=torch.float64) + 1
    scores = means @ _against(means, nats) / 32**0.5
    assert (scores < -0.5 * nats).all()
    assert (scores > -1.2 * nats).all()


def test_steering_states_of_a_hidden_start_get_less_attention():
    """With queries that share a direction, what is erased hardly counts any more."""
    model = build(make_config("llama"))
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("q_proj",)):
                module.weight.mul_(0.2)
                shared = torch.zeros_like(module.weight)
                shared[:, 0] = 1.0
                module.weight.add_(shared)
            if name.endswith("input_layernorm"):
                module.weight.mul_(0.3)
        model.model.embed_tokens.weight[:, 0] = 3.0
    ids, span = token_ids(40), kv.Span(12, 20)
    distances = {}
    exact = prefill(model, ids)
    kv.erase(model, exact, ids, span, method="full-recompute")
    with torch.no_grad():
        wanted = model(ids[:, -1:], past_key_values=exact, position_ids=torch.tensor([[32]])).logits
    for nats in (0.0, 6.0):
        eraser = kv.KVEraser.new(model, rank=2)
        if nats:
            assert hide(eraser, model, texts(), nats)
        cache = prefill(model, ids)
        kv.erase(model, cache, ids, span, method=kv.Steering(eraser, repair=len(ids)))
        with torch.no_grad():
            found = model(ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[40]])).logits
        distances[nats] = torch.nn.functional.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"
        ).item()
    assert distances[6.0] < 0.5 * distances[0.0]
