"""Replacing on a plain cache: what every method has to keep, whatever the lengths of old and new text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from conftest import CACHES, FAMILIES, next_logits, prefill, random_eraser, relative, same, states, tiny, token_ids
from kveraser.cache import Marks, Tokens
from kveraser.methods import Edit, Outcome, Plan
from kveraser.methods.cost_model import CostModel, PassCost
from kveraser.model.rope import frequencies, rotate
from kveraser.readers import calibrate, remember

REPLACING = [name for name, method in kv.methods().items() if method.replaces and method.compared]
FEW = settings(max_examples=6)


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    remember(tiny(), calibrate(tiny(), token_ids(500, seed=8)[0]))


@st.composite
def cases(draw):
    """Architecture, rows, cache, a context, a span anywhere in it, and new ids: fewer, as many or more."""
    length = draw(st.integers(8, 40))
    start = draw(st.integers(0, length - 2))
    span = kv.Span(start, draw(st.integers(start + 1, min(start + 9, length))))
    rows = draw(st.integers(1, 2))
    model = tiny(draw(st.sampled_from(FAMILIES)), 2, draw(st.sampled_from([torch.float32, torch.bfloat16])))
    ids, new = token_ids(length, rows), token_ids(draw(st.integers(1, 12)), rows, seed=3)
    alike = draw(st.integers(0, min(len(span), new.shape[1])))
    new[:, :alike] = ids[:, span.start : span.start + alike]
    return model, ids, span, new, CACHES[draw(st.sampled_from(sorted(CACHES)))]


def replaced(ids, span, new):
    return torch.cat([ids[:, : span.start], new, ids[:, span.end :]], 1)


@pytest.mark.parametrize("method", REPLACING)
@given(case=cases())
@FEW
def test_what_is_replaced_comes_back_bit_for_bit_and_the_ids_go_with_the_cache(method, case):
    model, ids, span, new, kind = case
    cache = prefill(model, ids, None, kind())
    before = states(cache)
    receipt = kv.replace(model, cache, ids, span, new, method=method, eraser=random_eraser(model))
    now = receipt.token_ids(ids)
    assert now.shape[1] == cache.get_seq_length()
    assert receipt.attention_mask(torch.ones_like(ids)).shape == now.shape
    assert torch.equal(now[:, receipt.replacement.slice], new)
    hidden = [slot for steered in receipt.steered for slot in steered]
    assert torch.equal(now[:, [slot for slot in range(now.shape[1]) if slot not in hidden]], replaced(ids, span, new))
    gone = set(ids[:, span.slice].flatten().tolist()) - set(replaced(ids, span, new).flatten().tolist())
    assert not gone & set(now.flatten().tolist())  # nothing shows an id that is said no more
    kv.restore(cache, receipt)
    assert same(states(cache), before)


@pytest.mark.parametrize("method", [name for name in REPLACING if kv.methods()[name].moves_keys])
@given(count=st.integers(5, 14))
@settings(max_examples=4)
def test_slots_hidden_earlier_stay_hidden_when_one_edit_puts_in_a_longer_text_and_takes_another_out(method, count):
    context = kv.ErasableContext(tiny(), eraser=kv.KVEraser.neutral(tiny()))
    context.append_ids(token_ids(120)[0])
    for span in (kv.Span(90, 96), kv.Span(35, 38)):
        context.erase_spans(span, kv.Steering(repair=2))
    before, keys, old = states(context.cache), context.cache.layers[0].keys.clone(), context.backend.marks.steered_spans
    receipt = context.replace_spans([kv.Span(20, 24), kv.Span(50, 58)], token_ids(count, seed=5)[0], method)
    new = context.backend.marks.steered_spans
    assert [len(span) for span in new] == [len(span) for span in old] == [3, 6]
    for was, now in zip(old, new, strict=True):
        back = rotate(context.cache.layers[0].keys[:, :, now.slice], was.start - now.start, frequencies(tiny()))
        assert relative([back], [keys[:, :, was.slice]]) < 1e-5
    context.restore(receipt)
    assert same(states(context.cache), before)
    assert context.backend.marks.steered_spans == old


@given(cases())
@FEW
def test_full_recomputation_equals_a_prefill_of_the_new_text(case):
    model, ids, span, new, kind = case
    cache = prefill(model, ids, [span.start], kind())
    receipt = kv.replace(model, cache, ids, span, new, method="full-recompute")
    assert receipt.exact
    said = replaced(ids, span, new)
    wanted = prefill(model, said)
    assert relative(states(cache), states(wanted)) < (1e-5 if model.dtype == torch.float32 else 3e-2)
    more = token_ids(3, ids.shape[0], 5)
    difference = (next_logits(model, cache, more) - next_logits(model, wanted, more)).abs().max()
    assert difference < (1e-4 if model.dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("method", [name for name in REPLACING if name != "full-recompute"])
@given(case=cases())
@settings(max_examples=4)
def test_new_tokens_are_computed_exactly_behind_what_is_before_them(method, case):
    model, ids, span, new, kind = case
    model = tiny("llama")
    cache = prefill(model, ids, None, kind())
    kv.replace(model, cache, ids, span, new, method=method, eraser=random_eraser(model))
    wanted = states(prefill(model, replaced(ids, span, new)))
    end = span.start + new.shape[1]
    assert relative([s[:, :, :end] for s in states(cache)], [s[:, :, :end] for s in wanted]) < 1e-5


@pytest.mark.parametrize("method", list(kv.methods()))
def test_equal_text_changes_nothing(method):
    model, ids = tiny(), token_ids(30)
    cache = prefill(model, ids)
    before = states(cache)
    receipt = kv.replace(model, cache, ids, kv.Span(10, 15), ids[0, 10:15], method=method)
    assert same(states(cache), before)
    assert (receipt.tokens_removed, receipt.tokens_recomputed, receipt.bytes_written) == (0, 0, 0)
    assert torch.equal(receipt.token_ids(ids), ids)
    kv.restore(cache, receipt)
    assert same(states(cache), before)


@given(cases())
@FEW
def test_only_the_span_and_the_chosen_slots_change(case):
    model, ids, span, new, kind = case
    model, new = tiny(), new[:, : len(span)]
    cache = prefill(model, ids, None, kind())
    before = states(cache)
    receipt = kv.replace(model, cache, ids, span, new, method=kv.Steering(kv.KVEraser.neutral(model), repair=4))
    if span.end == ids.shape[1]:
        return
    free = torch.ones(ids.shape[1], dtype=torch.bool)
    for run in (span, *receipt.recomputed):
        free[run.slice] = False
    assert receipt.positions_kept
    assert all(torch.equal(a[:, :, free], b[:, :, free]) for a, b in zip(before, states(cache), strict=True))


@pytest.mark.parametrize("method", ["kveraser", "full-recompute", "delete-and-shift"])
@pytest.mark.parametrize("count", [2, 5, 9])
def test_a_replacement_that_fails_half_way_changes_nothing(monkeypatch, method, count):
    model, ids = tiny(), token_ids(60)
    cache = prefill(model, ids)
    before = states(cache)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(model.model.layers[1], "forward", fail)
    with pytest.raises(MemoryError):
        kv.replace(model, cache, ids, kv.Span(10, 15), token_ids(count, seed=2), method, eraser=random_eraser(model))
    assert same(states(cache), before)


@pytest.mark.parametrize(("price", "used"), [(1.0, "kveraser"), (0.0, "full-recompute")])
def test_auto_counts_what_recomputing_the_new_text_would_cost(price, used):
    model, ids = tiny(), token_ids(400)
    costs = CostModel(PassCost(0.0, price, 0.0), PassCost(0.0, 1.0, 0.0))
    eraser = kv.KVEraser.neutral(model)
    receipt = kv.replace(model, prefill(model, ids), ids, kv.Span(10, 15), [5, 6], kv.Auto(eraser, costs=costs))
    assert receipt.method == used


def test_no_new_ids_erase():
    model, ids = tiny(), token_ids(30)
    cache, other = prefill(model, ids), prefill(model, ids)
    receipt = kv.replace(model, cache, ids, kv.Span(10, 15), [], method="full-recompute")
    kv.erase(model, other, ids, kv.Span(10, 15), method="full-recompute")
    assert same(states(cache), states(other))
    assert receipt.replacement is None
    assert receipt.tokens_removed == 5


@pytest.mark.parametrize("count", [3, 5, 8])
@pytest.mark.parametrize("method", ["full-recompute", "delete-and-shift", "kveraser"])
def test_rows_with_padding_in_front_are_replaced_like_rows_without(count, method):
    model, ids, new = tiny(), token_ids(30), token_ids(count, seed=4)
    eraser = kv.KVEraser.neutral(model)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    cache, wide = prefill(model, ids), prefill(model, padded, mask=mask)
    one = kv.replace(model, cache, ids, kv.Span(10, 15), new, method, eraser=eraser)
    two = kv.replace(model, wide, padded, kv.Span(14, 19), new, method, attention_mask=mask, eraser=eraser)
    assert torch.equal(two.token_ids(padded)[:, 4:], one.token_ids(ids))
    assert two.attention_mask(mask).sum() == one.token_ids(ids).shape[1]
    assert relative(states(cache), [tensor[:, :, 4:] for tensor in states(wide)]) < 1e-4
    with pytest.raises(kv.SpanError, match="padding"):
        kv.replace(model, prefill(model, padded, mask=mask), padded, kv.Span(2, 6), new, method, attention_mask=mask)


def test_what_stands_in_for_hidden_slots_is_never_an_id_that_was_replaced():
    model, ids = tiny(), torch.arange(3, 43)[None]
    eraser = kv.KVEraser.neutral(model)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(12, 16), eraser=eraser)
    now = first.token_ids(ids)
    assert now[0, 12:16].unique().tolist() == [ids[0, 11]]
    second = kv.replace(model, cache, now, kv.Span(10, 12), [80, 81], eraser=eraser)
    assert second.token_ids(now)[0, 10:16].tolist() == [80, 81, 81, 81, 81, 81]


@dataclass(frozen=True)
class Forgetting(kv.EraseMethod):
    """Knows nothing of new tokens."""

    name: ClassVar[str] = "forgetting"
    summary: ClassVar[str] = ""

    def plan(self, edit):
        return Plan(edit.length)

    def apply(self, edit, plan):
        return Outcome(edit.marks)


def test_what_cannot_be_replaced_is_refused_and_says_why():
    model, ids = tiny(), token_ids(30)
    cache = prefill(model, ids)
    before = states(cache)
    for options, error, word in [
        ({"method": Forgetting()}, kv.OptionError, "erases only"),
        ({"new_ids": [5, 97]}, kv.OptionError, "vocabulary"),
        ({"new_ids": [0.5]}, kv.OptionError, "integers"),
        ({"new_ids": token_ids(4, 2)}, kv.CacheMismatchError, "2 rows"),
        ({"span": kv.Span(28, 31)}, kv.SpanError, "30 tokens"),
    ]:
        given = {"span": kv.Span(10, 15), "new_ids": [5, 6], "method": "full-recompute", **options}
        with pytest.raises(error, match=word):
            kv.replace(model, cache, ids, **given)
    assert same(states(cache), before)


def test_an_edit_says_which_slots_are_new_and_which_are_left_over():
    edit = Edit(None, Tokens(token_ids(20)), (kv.Span(2, 6), kv.Span(9, 12)), Marks(), None, new=(1, 3))
    assert edit.fresh == (kv.Span(2, 3), kv.Span(9, 12))
    assert edit.spare == (kv.Span(3, 6),)
    assert edit.after.tolist() == [*range(3), *range(6, 20)]
    assert replace(edit, new=()).spare == edit.spans
