"""Training: the loss is what it says, gradients go where they should, a run leaves what it promises."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

import kveraser as kv
from conftest import build, make_config, make_tokenizer, prefill, random_eraser, states, text_model
from kveraser.evaluation import exact_match, kl_divergence, leaks, normalise
from kveraser.model_view import frozen
from kveraser.training import Prepared, TrainConfig, prepare, student_loss, train_eraser
from kveraser.training.losses import distillation_loss

EXAMPLE = Prepared(list(range(5, 25)), list(range(30, 38)), list(range(40, 60)), [70, 71, 72, 73], [80, 81, 82], True,
                   [90, 91, 92, 93, 94])  # fmt: skip


def test_kl_is_zero_for_equal_logits_and_positive_else():
    logits = torch.randn(4, 9)
    assert kl_divergence(logits, logits).abs().max() < 1e-6
    assert (kl_divergence(logits, torch.randn(4, 9)) > 0).all()
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    assert kl_divergence(p.log()[None], q.log()[None]).item() == pytest.approx(0.5 * (torch.log(p / q)).sum().item())


def test_cross_entropy_counts_gold_tokens_only():
    teacher = student = torch.randn(3, 9)
    targets, gold = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    expected = (F.cross_entropy(student[0], targets[0]) + F.cross_entropy(student[2], targets[2])) * 0.5 / 3
    assert distillation_loss(teacher, student, targets, gold, 0.5).item() == pytest.approx(expected.item(), rel=1e-4)
    assert distillation_loss(teacher, student, targets, gold, 0.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("window", [None, (2, 5)])
def test_the_loss_is_the_distance_that_real_erasing_has(window):
    """What training minimises must be what `kv.erase` does: compared through real caches, in both protocols."""
    model = text_model()
    eraser = random_eraser(model, window=window)
    e = EXAMPLE
    loss = student_loss(model, eraser.attached(model), e, window=window).item()
    context = torch.tensor([e.prefix + e.span + e.suffix + e.question])
    span = kv.Span(20, 28)
    with torch.no_grad():
        fresh = model(torch.tensor([e.prefix + e.suffix + e.question + e.answer])).logits[0]
        teacher_answer = fresh[-len(e.answer) - 1 : -1]
        teacher_more = model(torch.tensor([e.prefix + e.suffix + e.continuation])).logits[0][-len(e.continuation) : -1]
        cache = prefill(model, context[:, :-4])
        kv.erase(model, cache, context[:, :-4], span, eraser=eraser)
        start = cache.get_seq_length()

        def ahead(ids, at):
            where = torch.arange(at, at + len(ids))[None]
            logits = model(torch.tensor([ids]), position_ids=where, past_key_values=cache).logits[0]
            cache.crop(-len(ids))
            return logits

        after = ahead(e.question + e.answer[:-1], start)[len(e.question) - 1 :]
        more = ahead(e.continuation[:-1], start)
        cache = prefill(model, context)
        kv.erase(model, cache, context, span, eraser=eraser)
        cache.crop(-1)
        cached = ahead([e.question[-1], *e.answer[:-1]], start + len(e.question) - 1)
    parts = [
        kl_divergence(teacher_answer, after),
        kl_divergence(teacher_answer, cached),
        kl_divergence(teacher_more, more),
    ]
    assert loss == pytest.approx(torch.cat(parts).mean().item(), rel=1e-3)


def test_gradients_reach_the_eraser_and_nothing_else():
    model = build(make_config("llama", vocab_size=len(make_tokenizer())))
    eraser = kv.KVEraser.new(model, rank=2).train()
    base = frozen(model)
    student_loss(base, eraser.attached(base), EXAMPLE, window=None, cross_entropy_weight=0.3).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    reached = {name for name, p in eraser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("k_proj.lora_B" in name for name in reached)
    assert any("v_proj.lora_B" in name for name in reached)


def corpus(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "\n\n".join(
            f"The car number {n} is blue and fast. It has a door with a code. The code is {n * 37}." for n in range(30)
        )
    )
    return str(file)


def test_a_short_run_lowers_the_loss_and_leaves_an_eraser_and_a_log(tmp_path):
    model = text_model()
    config = TrainConfig(examples=48, batch=4, learning_rate=5e-3, warmup_steps=2, rank=4, alpha=8, window=(2, 16), average=0.5,
                         prefix=(4, 20), suffix=(4, 20), text=corpus(tmp_path), validate_every=4, validation_examples=6)  # fmt: skip
    seen = []
    weights = states(prefill(model, torch.tensor([[5, 6, 7]])))
    eraser = train_eraser(model, make_tokenizer(), config, tmp_path / "run", report=seen.append)
    first, last = seen[0].validation, min(p.validation for p in seen[1:] if p.validation is not None)
    assert last < 0.9 * first
    assert eraser.window == (2, 16)
    assert eraser.config.notes["training"]["examples"] == 48
    log = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "train.jsonl"]
    assert all(
        torch.equal(a, b) for a, b in zip(weights, states(prefill(model, torch.tensor([[5, 6, 7]]))), strict=True)
    )


def test_a_run_that_diverges_stops_with_a_name_and_keeps_the_last_good_eraser(tmp_path):
    model = text_model()
    config = TrainConfig(examples=40, batch=1, learning_rate=1e30, warmup_steps=1, rank=2, window=None, average=0.0, prefix=(4, 8),
                         suffix=(4, 8), text=corpus(tmp_path), validate_every=1, validation_examples=1)  # fmt: skip
    with pytest.raises(kv.OptionError, match="learning_rate=1e"):
        train_eraser(model, make_tokenizer(), config, tmp_path / "run")


@pytest.mark.parametrize("change", [{"examples": 0}, {"tasks": ("nothing",)}])
def test_an_impossible_configuration_is_refused(change):
    with pytest.raises(kv.OptionError):
        TrainConfig(**change)


def test_answers_are_compared_as_squad_does():
    assert normalise("The  Gull, of 1911!") == "gull of 1911"
    assert exact_match(" The Gull.\nMore", "gull")
    assert exact_match("Gull is the ship", "Gull")
    assert not exact_match("a seagull", "gull")
    assert leaks("It takes 31 days", "31")
    assert not leaks("It takes 310 days", "31")


def test_an_example_is_tokenised_part_by_part():
    from kveraser.tasks.base import EraseExample

    example = EraseExample("the code ", "is 1. ", "the car", "which?", None, "1", " is blue")
    prepared = prepare(example, lambda text: make_tokenizer().encode(text, add_special_tokens=False))
    assert not prepared.gold
    assert make_tokenizer().decode(prepared.answer).strip() == "The text does not say."
