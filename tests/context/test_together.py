"""Several contexts advance by one token each in one forward, as each would by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from conftest import FAMILIES, random_eraser, relative, same, states, tiny, token_ids
from kveraser.context import advance_together
from kveraser.errors import ContextError, OptionError, UnsupportedCacheError

LENGTHS = (5, 40, 17, 1)


def contexts_of(model, lengths=LENGTHS, **options):
    """Contexts of different lengths."""
    made = []
    for seed, length in enumerate(lengths):
        context = kv.ErasableContext(model, **options)
        context.append_ids(token_ids(length, seed=seed)[0])
        made.append(context)
    return made


def off(together, alone, steps=3):
    """How far contexts that advance together are from those that do so alone, in logits and states."""
    worst = 0.0
    for step in range(steps):
        tokens = [7 + step + row for row in range(len(alone))]
        rows = advance_together(together, tokens)
        own = [context.advance([token]) for context, token in zip(alone, tokens, strict=True)]
        worst = max(worst, relative(rows, own))
    for left, right in zip(together, alone, strict=True):
        assert left.live_ids == right.live_ids
        assert left.exact == right.exact
        worst = max(worst, relative(states(left.cache), states(right.cache)))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_contexts_of_different_lengths_advance_together_as_alone(family, kv_heads):
    model = tiny(family, kv_heads)
    assert off(contexts_of(model), contexts_of(model)) < 1e-5


def test_in_bfloat16_too():
    model = tiny(dtype=torch.bfloat16)
    assert off(contexts_of(model), contexts_of(model)) < 2e-2


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_was_erased_is_as_gone_together_as_alone(family):
    """Gaps of neutral states closed, trained states attended to, keys moved: each row as its own cache says."""
    model = tiny(family)
    neutral = kv.Steering(kv.KVEraser.neutral(model, ids=token_ids(300)[0]), repair=0, keys=None)
    trained = random_eraser(model)

    def edited():
        made = contexts_of(model, (30, 40, 20, 25), eraser=trained)
        made[0].erase(kv.Span(4, 9), neutral)
        made[0].erase(kv.Span(12, 14), neutral)
        made[1].erase(kv.Span(10, 20), kv.Steering(repair=0, keys=None))
        made[2].erase(kv.Span(3, 8), "delete-and-shift")
        return made

    assert off(edited(), edited()) < 1e-4


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, unique=True), min_size=1, max_size=5))
def test_contexts_join_and_leave_between_steps(rounds):
    together, alone = contexts_of(tiny()), contexts_of(tiny())
    for step, who in enumerate(rounds):
        rows = advance_together([together[row] for row in who], [9 + step] * len(who))
        assert relative(rows, [alone[row].advance([9 + step]) for row in who]) < 1e-5
    assert all(relative(states(a.cache), states(b.cache)) < 1e-5 for a, b in zip(together, alone, strict=True))


def test_one_alone_gets_the_very_bits_of_advance():
    (together,), (alone,) = contexts_of(tiny(), (20,)), contexts_of(tiny(), (20,))
    assert torch.equal(advance_together([together], [5])[0], alone.advance([5]))
    assert same(states(together.cache), states(alone.cache))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_failure_in_any_layer_leaves_every_context_and_the_model_as_they_were(layer, monkeypatch):
    model = tiny()
    contexts = contexts_of(model)
    before, names = [states(context.cache) for context in contexts], dict(model.named_modules())

    def fail(*_, **__):
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[layer].mlp, "forward", fail)
        with pytest.raises(MemoryError):
            advance_together(contexts, [5, 6, 7, 8])
    assert all(same(states(context.cache), old) for context, old in zip(contexts, before, strict=True))
    assert [len(context) for context in contexts] == list(LENGTHS)
    assert off(contexts, contexts_of(model)) < 1e-5
    assert dict(model.named_modules()) == names
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("tokens", "error"), [([5, 6, 7, 10**6], ContextError), ([5, 6, 7], OptionError), ([5] * 5, OptionError)]
)
def test_what_cannot_be_run_is_refused_and_nothing_is_changed(tokens, error):
    contexts = contexts_of(tiny())
    before = [states(context.cache) for context in contexts]
    with pytest.raises(error):
        advance_together(contexts, tokens)
    assert all(same(states(context.cache), old) for context, old in zip(contexts, before, strict=True))


def test_the_same_context_twice_an_empty_one_and_one_of_another_model_are_refused():
    first, second = contexts_of(tiny(), (5, 6))
    for contexts in ([first, first], [first, kv.ErasableContext(tiny())], [first, *contexts_of(tiny("qwen2"), (5,))]):
        with pytest.raises(OptionError):
            advance_together(contexts, [5, 6])
    assert len(first) == 5
    assert off([first, second], contexts_of(tiny(), (5, 6))) < 1e-5


def test_attention_with_scores_of_its_own_is_refused_and_nothing_is_changed(monkeypatch):
    model = tiny()
    contexts = contexts_of(model)
    before = [states(context.cache) for context in contexts]
    kind = type(model.model.layers[1].self_attn)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **options: forward(self, *args, softcap=30.0, **options))
    with pytest.raises(UnsupportedCacheError, match="softcap"):
        advance_together(contexts, [5, 6, 7, 8])
    assert all(same(states(context.cache), old) for context, old in zip(contexts, before, strict=True))
