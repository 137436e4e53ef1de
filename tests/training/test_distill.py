"""The loss is the distance that real erasing has, and its gradients go to the eraser alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, random_eraser, text_model, tiny, token_ids
from kveraser.evaluation import kl_divergence
from kveraser.model.attention import for_packing, grouped_attention
from kveraser.readers import calibrate
from kveraser.training.cases import prefill as prefill_lessons
from kveraser.training.distill import judge
from kveraser.training.draws import Drawn, pack
from kveraser.training.lessons import Erase, Lesson, Probe
from kveraser.training.losses import distillation_loss
from kveraser.training.prepared import prepare, teach
from kveraser.training.rereading import Repairing

QUESTIONS = ((80, 81, 82), (83, 84, 85, 86))
FIRST, SECOND = kv.Span(10, 18), kv.Span(40, 46)


def probes(index):
    question = QUESTIONS[index]
    return (
        Probe((*question, 90), (90, 91), True),
        Probe((question[-1], 90), (90, 91), True, index, "query_cached"),
        Probe((92, 93, 94), (93, 94, 95), kind="continuation"),
    )


def lesson(shift=0):
    """One context, its spans erased alone and together."""
    erases = (
        Erase((FIRST,), probes(0)),
        Erase((SECOND,), probes(1)),
        Erase((FIRST, SECOND), (*probes(0), *probes(1))),
    )
    return Lesson(tuple(range(5 + shift, 75 + shift)), erases, QUESTIONS)


@torch.no_grad()
def really(model, one, erase, probe, method):
    """Logits of the targets by way of a real cache."""
    asked = [] if probe.cached is None else list(one.questions[probe.cached][:-1])
    context = torch.tensor([[*one.ids, *asked]])
    cache = prefill(model, context)
    receipt = kv.erase(model, cache, context, list(erase.spans), method=method)
    start = cache.get_seq_length() if not receipt.positions_kept else context.shape[1]
    where = torch.arange(start, start + len(probe.ids))[None]
    with kv.reading(model, cache) as reading:
        logits = reading(torch.tensor([probe.ids]), position_ids=where, past_key_values=cache).logits[0]
    return logits[-len(probe.targets) :]


@pytest.mark.parametrize(
    ("options", "repair"),
    [
        ({}, 0), ({}, 6), ({}, 24), ({"acts_on": "readers"}, 6), ({"acts_on": "readers"}, 24),
        ({"values": "learned"}, 0), ({"values": "learned"}, 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, (2, 5), (3, 30)])
def test_the_loss_is_the_distance_that_real_erasing_has(window, options, repair):
    """What training minimises must be what `kv.erase` does: several lessons, spans and protocols against real caches."""
    model = text_model()
    eraser = random_eraser(model, window=window, **options)
    eraser.calibration = calibrate(model, token_ids(600)[0])
    lessons = [lesson(), lesson(shift=7)]
    repairing = Repairing(repair, eraser.calibration, eraser.steers_readers) if repair else None
    with torch.no_grad():
        prepared = prepare(model, lessons, repairing)
        judged = judge(model, eraser.attached(model), prepared, window=window)
    at = 0
    for case in prepared.prefilled.cases:
        for probe in case.probes:
            own = slice(at, at + len(probe.targets))
            at = own.stop
            exact = really(model, case.lesson, case.erase, probe, "full-recompute")
            erased = really(model, case.lesson, case.erase, probe, kv.Steering(eraser, repair=repair))
            torch.testing.assert_close(judged.teacher[own], exact, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(judged.student[own], erased, atol=1e-4, rtol=1e-4)
    assert at == len(judged.targets)


def test_kl_and_the_loss_agree_and_cross_entropy_counts_gold_tokens_only():
    teacher, student = torch.randn(3, 9), torch.randn(3, 9)
    targets, gold = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    plain = distillation_loss(teacher, student, targets, gold)
    torch.testing.assert_close(plain, kl_divergence(teacher, student))
    weighted = distillation_loss(teacher, student, targets, gold, 0.5)
    expected = 0.5 * F.cross_entropy(student, targets, reduction="none") * gold
    torch.testing.assert_close(weighted - plain, expected)


def test_gradients_reach_the_eraser_and_nothing_else():
    model = build(make_config("llama"))
    eraser = kv.KVEraser.new(model, rank=2).train()
    base = for_packing(model)
    judged = judge(base, eraser.attached(base), prepare(base, [lesson()]), window=None)
    distillation_loss(judged.teacher, judged.student, judged.targets, judged.gold).mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    reached = {name for name, p in eraser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("k_proj.lora_B" in name for name in reached)
    assert any("v_proj.lora_B" in name for name in reached)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_for_packed_rows_is_the_models_own(family):
    model = tiny(family)
    fast = for_packing(model)
    assert model.config._attn_implementation == "sdpa"
    assert fast.config._attn_implementation != "sdpa"
    one = Lesson(tuple(range(5, 75)), (Erase((FIRST,), probes(0)),), QUESTIONS)
    with torch.no_grad():
        slow_logits = teach(model, prefill_lessons(model, [one]))
        torch.testing.assert_close(teach(fast, prefill_lessons(fast, [one])), slow_logits, atol=1e-3, rtol=1e-3)


def test_grouped_attention_is_attention():
    query, key, value = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.zeros(1, 1, 5, 9).masked_fill(torch.rand(1, 1, 5, 9) < 0.4, torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    found, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_lessons_are_packed_in_order_and_a_long_one_stands_alone():
    lessons = [Drawn(Lesson((1,) * length, (), ())) for length in (100, 200, 900, 50, 300)]
    groups = list(pack(lessons, 640))
    assert [len(one.lesson.ids) for group in groups for one in group] == [100, 200, 900, 50, 300]
    assert [len(group) for group in groups] == [2, 1, 2]


def test_lessons_are_packed_with_those_of_the_same_repair():
    drawn = [Drawn(Lesson((1,) * 100, (), ()), number=number, repair=(0, 64)[number % 2]) for number in range(6)]
    assert [[one.number for one in group] for group in pack(drawn, 250)] == [[0, 2], [4], [1, 3], [5]]


def test_learned_values_start_from_zero_and_keys_from_the_spans_own():
    model, ids = text_model(), token_ids(12)
    eraser = kv.KVEraser.new(model, values="learned")
    plain, steered = (each(ids, use_cache=True).past_key_values.layers[0] for each in (model, eraser.attached(model)))
    assert not steered.values.any()
    assert torch.equal(steered.keys, plain.keys)
    partly = eraser.attached(model, first=5)(ids, use_cache=True).past_key_values.layers[0]
    assert not partly.values[:, :, :5].any()
    assert torch.equal(partly.values[:, :, 5:], plain.values[:, :, 5:])


def test_learned_values_learn():
    base = for_packing(text_model())
    eraser = random_eraser(base, values="learned").train()
    judged = judge(base, eraser.attached(base), prepare(base, [lesson()]), window=None)
    distillation_loss(judged.teacher, judged.student, judged.targets, judged.gold).mean().backward()
    values = [parameter.grad for name, parameter in eraser.named_parameters() if "v_proj" in name]
    assert values
    assert all(grad is not None and grad.any() for grad in values)
