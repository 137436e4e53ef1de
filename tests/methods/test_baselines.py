"""The approximate baselines: what they must equal at their limits, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import FAMILIES, prefill, relative, same, states, tiny, token_ids


def erased(model, ids, span, method):
    cache = prefill(model, ids, [span.start, span.end])
    return cache, kv.erase(model, cache, ids, span, method=method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", [kv.LocalSuffixRepair(tokens=99), kv.SelectiveRecompute(ratio=1.0)], ids=lambda m: m.name
)
@given(start=st.integers(0, 20), size=st.integers(1, 9), behind=st.integers(1, 30))
def test_recomputing_the_whole_suffix_equals_full_recomputation(family, method, start, size, behind):
    model, ids = tiny(family), token_ids(start + size + behind, 2)
    span = kv.Span(start, start + size)
    exact, _ = erased(model, ids, span, "full-recompute")
    other, receipt = erased(model, ids, span, method)
    assert receipt.exact
    assert receipt.tokens_recomputed == behind
    assert same(states(other), states(exact))


@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 30))
def test_scattered_recomputation_of_all_but_one_token_is_close_to_full_recomputation(start, size, behind):
    model, ids, span = tiny(), token_ids(start + size + behind), kv.Span(start, start + size)
    cache = prefill(model, ids)
    kv.erase(model, cache, ids, span, method="delete-and-shift")
    from kveraser.cache import Repair, Tokens, repair_slots

    short = torch.cat([ids[:, :start], ids[:, span.end :]], 1)
    every = torch.arange(short.shape[1])
    repair_slots(model, cache, Tokens(short), [Repair(every[start:], every)])
    assert relative(states(cache), states(prefill(model, short))) < 1e-5


def test_selective_recomputation_always_takes_the_last_token():
    model, ids, span = tiny(), token_ids(60), kv.Span(10, 20)
    shifted, _ = erased(model, ids, span, "delete-and-shift")
    cache, receipt = erased(model, ids, span, kv.SelectiveRecompute(ratio=0.01))
    assert receipt.tokens_recomputed == 1
    for a, b in zip(states(shifted), states(cache), strict=True):
        assert torch.equal(a[:, :, :-1], b[:, :, :-1])
    assert not same([t[:, :, -1:] for t in states(shifted)], [t[:, :, -1:] for t in states(cache)])


def test_selective_recomputation_takes_the_tokens_that_deviate_most():
    model, ids, span = tiny(), token_ids(60), kv.Span(10, 20)
    exact, _ = erased(model, ids, span, "full-recompute")
    shifted, _ = erased(model, ids, span, "delete-and-shift")
    cache, _ = erased(model, ids, span, kv.SelectiveRecompute(ratio=0.2))
    layer = 1
    deviation = sum(
        (getattr(exact.layers[layer], part) - getattr(shifted.layers[layer], part)).pow(2).sum((0, 1, 3))
        for part in ("keys", "values")
    )
    deviation[-1] = torch.inf
    changed = (shifted.layers[2].keys != cache.layers[2].keys).any(-1).any(1)[0]
    expected = set(deviation[10:].topk(8).indices.add(10).tolist())
    assert set(changed.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("family", FAMILIES)
@given(start=st.integers(0, 20), size=st.integers(1, 9), behind=st.integers(1, 30))
def test_delete_and_shift_leaves_the_prefix_alone_and_moves_layer_zero_exactly(family, start, size, behind):
    model, ids, span = tiny(family), token_ids(start + size + behind), kv.Span(start, start + size)
    exact, _ = erased(model, ids, span, "full-recompute")
    shifted, receipt = erased(model, ids, span, "delete-and-shift")
    assert receipt.tokens_recomputed == 0
    assert same([t[:, :, :start] for t in states(exact)], [t[:, :, :start] for t in states(shifted)])
    # Layer 0 depends on token and position alone, so there a moved state must equal a computed one.
    assert relative(states(shifted)[:2], states(exact)[:2]) < 1e-5


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: kv.LocalSuffixRepair(tokens=0), "tokens=0"),
        (lambda: kv.SelectiveRecompute(ratio=0.0), "ratio=0.0"),
        (lambda: kv.SelectiveRecompute(ratio=1.5), "ratio=1.5"),
        (lambda: kv.FullRecompute(chunk=0), "chunk=0"),
        (lambda: kv.Steering(window=(-1, 3)), "window=(-1, 3)"),
        (lambda: kv.Steering(repair=-1), "repair=-1"),
    ],
)
def test_impossible_options_are_refused_with_their_value(make, needle):
    with pytest.raises(kv.OptionError, match=needle.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_an_unknown_method_is_refused_with_a_suggestion():
    model, ids = tiny(), token_ids(9)
    with pytest.raises(kv.OptionError, match="did you mean 'full-recompute'"):
        kv.erase(model, prefill(model, ids), ids, kv.Span(1, 2), method="full-recomputation")


def test_cropping_the_end_exactly_mends_what_an_earlier_deletion_left():
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(0, 4), method="delete-and-shift")
    ids = receipt.token_ids(ids)
    last = kv.erase(model, cache, ids, kv.Span(14, 16), method="full-recompute")
    assert last.exact
    assert last.tokens_recomputed == 14
    assert relative(states(cache), states(prefill(model, ids[:, :14]))) < 1e-5
