"""`kv.erase` and `kv.restore` on plain caches: padded batches, several edits, bad input."""

from __future__ import annotations

import copy
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import kveraser as kv
from conftest import CACHES, FAMILIES, prefill, random_eraser, relative, same, states, tiny, token_ids
from kveraser.cache import TransformersBackend, get_marks, growable_cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [name for name in kv.methods() if name != "no-erase"])
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=5)
@given(
    pads=st.lists(st.integers(0, 6), min_size=2, max_size=3),
    start=st.integers(7, 12),
    size=st.integers(1, 5),
    behind=st.integers(8, 15),
)
def test_a_padded_row_is_edited_as_it_would_be_alone(family, method, side, pads, start, size, behind):
    model = tiny(family)
    length, rows = start + size + behind, len(pads)
    ids = token_ids(length, rows)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        where = slice(0, pad) if side == "left" else slice(length - pad, length)
        mask[row, where] = 0
        ids[row, where] = 0
    cache = prefill(model, ids, mask=mask)
    eraser = random_eraser(model)
    chosen = (
        kv.SelectiveRecompute(ratio=1.0) if method == "selective-recompute" else method
    )  # it ranks by the batch's mean
    receipt = kv.erase(
        model, cache, ids, kv.Span(start, start + size), method=chosen, attention_mask=mask, eraser=eraser
    )
    new_mask = receipt.attention_mask(mask)
    for row in range(rows):
        real = mask[row].bool()
        alone_ids = ids[row : row + 1, real]
        offset = pads[row] if side == "left" else 0
        alone = prefill(model, alone_ids)
        kv.erase(
            model,
            alone,
            alone_ids,
            kv.Span(start - offset, start - offset + size),
            method=_fixed(chosen, receipt),
            eraser=eraser,
        )
        kept = new_mask[row].bool()
        got = [tensor[row : row + 1][:, :, kept] for tensor in states(cache)]
        assert relative(got, states(alone)) < 1e-4


def _fixed(method, receipt):
    """What `auto` chose for the batch, for the row alone."""
    return receipt.method if method == "auto" else method


@given(st.integers(0, 4), st.integers(1, 5))
def test_a_span_may_cover_padding_in_some_rows(pad, size):
    model = tiny()
    ids, mask = token_ids(25, 2), torch.ones(2, 25, dtype=torch.long)
    mask[1, :pad] = 0
    cache = prefill(model, ids, mask=mask)
    receipt = kv.erase(model, cache, ids, kv.Span(1, 1 + size), method="full-recompute", attention_mask=mask)
    fresh = prefill(model, receipt.token_ids(ids), mask=receipt.attention_mask(mask))
    kept = receipt.attention_mask(mask)[1].bool()
    got = [tensor[1:, :, kept] for tensor in states(cache)]
    assert relative(got, [tensor[1:, :, kept] for tensor in states(fresh)]) < 1e-4
    shifted = prefill(model, ids, mask=mask)
    kv.erase(model, shifted, ids, kv.Span(1, 1 + size), method="delete-and-shift", attention_mask=mask)
    assert relative([shifted.layers[0].keys[1:, :, kept]], [fresh.layers[0].keys[1:, :, kept]]) < 1e-4


@pytest.mark.parametrize("method", [name for name in kv.methods() if name != "no-erase"])
@pytest.mark.parametrize("pads", [(4, 4), (4, 6)])
def test_the_last_text_of_rows_that_are_all_padded_behind_it_is_erased_and_replaced(method, pads):
    model, ids, mask = tiny(), token_ids(40, 2), torch.ones(2, 40, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, 40 - pad :] = 0
    cache = prefill(model, ids, mask=mask)
    before, end = states(cache), 40 - max(pads)
    receipt = kv.erase(model, cache, ids, kv.Span(28, end), method, mask, eraser=random_eraser(model))
    assert receipt.residual in (None, 0.0)
    assert receipt.token_ids(ids).shape[1] == cache.get_seq_length() == receipt.attention_mask(mask).shape[1]
    assert same([tensor[:, :, :28] for tensor in states(cache)], [tensor[:, :, :28] for tensor in before])
    kv.restore(cache, receipt)
    assert same(states(cache), before)
    if kv.methods()[method].replaces:
        new = kv.replace(model, cache, ids, kv.Span(28, end), [5, 6, 7], method, mask, eraser=random_eraser(model))
        fresh = prefill(model, new.token_ids(ids)[:, :31], mask=new.attention_mask(mask)[:, :31])
        assert relative([t[:, :, :31] for t in states(cache)], states(fresh)) < 1e-4
        kv.restore(cache, new)
        assert same(states(cache), before)


def test_position_ids_of_the_callers_own_are_respected():
    model, ids = tiny(), token_ids(20)
    positions = torch.arange(100, 120)[None]
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, position_ids=positions, past_key_values=cache)
    kv.erase(model, cache, ids, kv.Span(5, 9), method="full-recompute", position_ids=positions)
    fresh = DynamicCache()
    short = torch.cat([ids[:, :5], ids[:, 9:]], 1)
    with torch.no_grad():
        model(short, position_ids=torch.arange(100, 116)[None], past_key_values=fresh)
    assert relative(states(cache), states(fresh)) < 1e-5


@pytest.mark.parametrize("method", ["full-recompute", "delete-and-shift", "kveraser"])
def test_tokens_appended_since_are_recomputed_at_the_callers_own_positions(method):
    model, ids, eraser = tiny(), token_ids(28), random_eraser(tiny())
    positions = torch.arange(100, 128)[None]
    cache, fresh = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for part in (slice(0, 20), slice(20, 28)):
            model(ids[:, part], position_ids=positions[:, part], past_key_values=fresh)
        model(ids[:, :20], position_ids=positions[:, :20], past_key_values=cache)
        receipt = kv.erase(
            model, cache, ids[:, :20], kv.Span(5, 9), method, position_ids=positions[:, :20], eraser=eraser
        )
        model(ids[:, 20:], past_key_values=cache)
    with pytest.raises(kv.CacheMismatchError, match="position_ids has shape"):
        kv.restore(cache, receipt, model=model, token_ids=ids, position_ids=positions[:, :20])
    assert kv.restore(cache, receipt, model=model, token_ids=ids, position_ids=positions) == 8
    assert same(states(cache), states(fresh))


def test_plain_lists_of_ids_work():
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids[0].tolist(), kv.Span(3, 6), method="delete-and-shift")
    assert receipt.token_ids(ids[0].tolist()) == ids[0, :3].tolist() + ids[0, 6:].tolist()


BAD = {
    "out of range": ({"span": (15, 40)}, kv.SpanError, "20 tokens"),
    "overlapping": ({"span": [(1, 5), (4, 8)]}, kv.SpanError, "overlap"),
    "no span": ({"span": []}, kv.SpanError, "no span"),
    "too few ids": ({"ids": 12}, kv.CacheMismatchError, "20 tokens"),
    "too many ids": ({"ids": 25}, kv.CacheMismatchError, "20 tokens"),
    "a mask of another length": ({"mask": 12}, kv.CacheMismatchError, "attention_mask"),
    "unknown method": ({"method": "forget"}, kv.OptionError, "forget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name_and_changes_nothing(case):
    options, error, words = BAD[case]
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids)
    before = states(cache)
    span = options.get("span", (3, 6))
    spans = [kv.Span(*pair) for pair in span] if isinstance(span, list) else kv.Span(*span)
    mask = torch.ones(1, options["mask"]) if "mask" in options else None
    with pytest.raises(error, match=f"(?s){words}"):
        kv.erase(model, cache, token_ids(options.get("ids", 20)), spans, options.get("method", "full-recompute"), mask)
    assert same(states(cache), before)


def test_a_span_that_is_steered_already_is_refused():
    model, ids = tiny(), token_ids(30)
    eraser = random_eraser(model)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(5, 10), eraser=eraser)
    before = states(cache)
    with pytest.raises(kv.SpanError, match=r"\[5, 10\), which is erased already"):
        kv.erase(model, cache, first.token_ids(ids), kv.Span(8, 14), eraser=eraser)
    assert same(states(cache), before)


def test_readers_of_a_span_that_is_erased_already_are_refused():
    model, ids = tiny(), token_ids(300)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(10, 16), eraser=random_eraser(model))
    before, ids = states(cache), receipt.token_ids(ids)
    for span in (kv.Span(10, 16), kv.Span(8, 11), [kv.Span(2, 4), kv.Span(15, 20)]):
        with pytest.raises(kv.SpanError, match=r"overlaps \[10, 16\), which is erased already"):
            kv.readers(model, cache, ids, span)
    assert same(states(cache), before)


def test_exactness_is_that_of_the_whole_cache():
    model, ids = tiny(), token_ids(40)
    eraser = random_eraser(model)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(5, 10), eraser=eraser)
    ids = first.token_ids(ids)
    second = kv.erase(model, cache, ids, kv.Span(20, 24), method="full-recompute")
    assert not first.exact
    assert second.exact
    short = second.token_ids(ids)
    assert short.shape[1] == cache.get_seq_length() == 31
    assert relative(states(cache), states(prefill(model, short))) < 1e-5
    cache = prefill(model, token_ids(40))
    kv.erase(model, cache, token_ids(40), kv.Span(5, 10), method="delete-and-shift")
    tail = kv.erase(model, cache, token_ids(35), kv.Span(30, 35), method="delete-and-shift")
    assert not tail.exact


def test_cropping_behind_an_edit_and_filling_again_forgets_it():
    model, ids = tiny(), token_ids(30)
    cache = prefill(model, ids)
    kv.erase(model, cache, ids, kv.Span(5, 10), eraser=random_eraser(model))
    assert not get_marks(cache).exact
    cache.crop(-25)
    prefilled = copy.deepcopy(cache)
    assert get_marks(cache).exact
    with torch.no_grad():
        model(ids[:, 5:], past_key_values=cache)
    assert get_marks(cache).steered == ()
    assert kv.erase(model, cache, ids, kv.Span(6, 9), method="delete-and-shift").tokens_removed == 3
    assert get_marks(prefilled).exact


@pytest.mark.parametrize("kind", sorted(CACHES))
@pytest.mark.parametrize("crop", [8, 15, 24, 29])
@pytest.mark.parametrize("method", ["kveraser", "delete-and-shift", "full-recompute"])
def test_what_was_cropped_and_filled_again_is_never_overwritten_by_a_restore(method, crop, kind):
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids, cache=CACHES[kind]())
    receipt = kv.erase(model, cache, ids, kv.Span(10, 20), method, eraser=random_eraser(model))
    cache.crop(crop - cache.get_seq_length())
    with pytest.raises(kv.RestoreError, match="cropped since"):
        kv.restore(cache, receipt)
    with torch.no_grad():
        model(token_ids(40 - crop, seed=1), past_key_values=cache)
    before = states(cache)
    with pytest.raises(kv.RestoreError, match="cropped since"):
        kv.restore(cache, receipt, model=model, token_ids=token_ids(50))
    assert same(states(cache), before)


def test_a_replacement_that_was_cropped_and_filled_again_is_forgotten_under_later_edits_too():
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids)
    older = kv.replace(model, cache, ids, kv.Span(10, 12), [5, 6], eraser=random_eraser(model))
    cache.crop(-32)
    now = torch.cat([ids[:, :8], token_ids(32, seed=1)], 1)
    with torch.no_grad():
        model(now[:, 8:], past_key_values=cache)
    newer = kv.erase(model, cache, now, kv.Span(36, 38), eraser=random_eraser(model))
    with pytest.raises(kv.RestoreError, match="cropped since"):
        kv.restore(cache, older)
    kv.restore(cache, newer)


@pytest.mark.parametrize("kind", ["trained", "neutral"])
@pytest.mark.parametrize("more", [0, 3, 9])
def test_steered_slots_that_a_crop_leaves_are_no_live_tokens_and_what_fills_the_others_is(more, kind):
    model, ids, later = tiny(), token_ids(40), token_ids(more, seed=1)
    eraser = random_eraser(model) if kind == "trained" else kv.KVEraser.neutral(model)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(20, 30), kv.Steering(eraser, repair=0))
    cache.crop(-15)
    if more:
        with torch.no_grad():
            model(later, past_key_values=cache)
    assert get_marks(cache).steered_spans == (kv.Span(20, 25),)
    now = torch.cat([receipt.token_ids(ids)[:, :25], later], 1)
    second = kv.erase(model, cache, now, kv.Span(5, 8), "full-recompute")
    assert second.exact
    left = torch.cat([ids[:, :5], ids[:, 8:20], later], 1)
    assert second.token_ids(now).tolist() == left.tolist()
    assert relative(states(cache), states(prefill(model, left))) < 1e-5


def ending_with_steered_slots():
    """A model, 40 ids, a cache that was cropped behind the steered slots [20, 30), and the ids that it holds."""
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(20, 30), eraser=random_eraser(model))
    cache.crop(-10)
    return model, ids, cache, first.token_ids(ids)[:, :30]


@pytest.mark.parametrize("method", [name for name in kv.methods() if name != "no-erase"])
def test_steered_slots_that_a_crop_left_last_go_with_the_span_before_them(method):
    model, ids, cache, now = ending_with_steered_slots()
    before = states(cache)
    receipt = kv.erase(model, cache, now, kv.Span(10, 20), method, eraser=random_eraser(model))
    assert receipt.exact
    assert torch.equal(receipt.token_ids(now), ids[:, :10])
    assert same(states(cache), [tensor[:, :, :10] for tensor in before])
    kv.restore(cache, receipt)
    assert same(states(cache), before)


@pytest.mark.parametrize("method", [name for name in kv.methods() if name != "no-erase"])
def test_steered_slots_that_a_crop_left_last_are_no_suffix(method):
    model, _, cache, now = ending_with_steered_slots()
    receipt = kv.erase(model, cache, now, kv.Span(5, 8), method, eraser=random_eraser(model))
    assert cache.get_seq_length() == (20 if receipt.positions_kept else 17)


def test_steered_slots_that_a_crop_left_last_go_when_what_is_before_them_is_replaced_and_stay_when_it_says_the_same():
    model, ids = tiny(), token_ids(40)
    eraser = random_eraser(model)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(20, 30), eraser=eraser)
    cache.crop(-10)
    before, now = states(cache), first.token_ids(ids)[:, :30]
    kv.replace(model, cache, now, kv.Span(10, 12), now[0, 10:12], eraser=eraser)
    assert same(states(cache), before)
    receipt = kv.replace(model, cache, now, kv.Span(10, 20), [5, 6], eraser=eraser)
    left = torch.cat([ids[:, :10], torch.tensor([[5, 6]])], 1)
    assert receipt.exact
    assert torch.equal(receipt.token_ids(now), left)
    assert relative(states(cache), states(prefill(model, left))) < 1e-5


@given(st.permutations([0, 1, 2]), st.sampled_from(sorted(CACHES)))
def test_steering_edits_can_be_restored_in_any_order(order, kind):
    model, ids = tiny(), token_ids(40)
    eraser = random_eraser(model)
    cache = prefill(model, ids, cache=CACHES[kind]())
    before = states(cache)
    receipts = []
    for start in (5, 15, 25):
        receipts.append(kv.erase(model, cache, ids, kv.Span(start, start + 4), eraser=eraser))
        ids = receipts[-1].token_ids(ids)
    for index in order:
        assert not get_marks(cache).exact
        kv.restore(cache, receipts[index])
    assert same(states(cache), before)
    assert get_marks(cache).exact


@given(st.integers(0, 12))
def test_restoring_an_edit_never_brings_back_what_a_later_one_has_erased(distance):
    model, ids = tiny(), token_ids(40)
    eraser = random_eraser(model, repair=6)
    cache = prefill(model, ids)
    first = kv.erase(model, cache, ids, kv.Span(5, 9), eraser=eraser)
    second_span = kv.Span(9 + distance, 12 + distance)
    kv.erase(model, cache, first.token_ids(ids), second_span, eraser=eraser)
    before = states(cache)
    if distance < 6:  # the first edit had repaired tokens that the second one erased
        with pytest.raises(kv.RestoreError, match="restore the later one first"):
            kv.restore(cache, first)
        assert same(states(cache), before)
    else:
        kv.restore(cache, first)
        for now, then in zip(states(cache), before, strict=True):
            assert torch.equal(now[:, :, second_span.slice], then[:, :, second_span.slice])


def test_edits_that_moved_the_suffix_are_restored_newest_first():
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids)
    before = states(cache)
    first = kv.erase(model, cache, ids, kv.Span(5, 9), method="delete-and-shift")
    second = kv.erase(model, cache, first.token_ids(ids), kv.Span(10, 14), method="delete-and-shift")
    with pytest.raises(kv.RestoreError, match="newest to oldest"):
        kv.restore(cache, first)
    kv.restore(cache, second)
    kv.restore(cache, first)
    assert same(states(cache), before)


def test_restore_says_why_it_cannot():
    model, ids = tiny(), token_ids(30)
    eraser = random_eraser(model)
    cache = prefill(model, ids)
    freed = kv.erase(model, cache, ids, kv.Span(20, 24), eraser=eraser, undo=False)
    with pytest.raises(kv.RestoreError, match="kept no states"):
        kv.restore(cache, freed)
    receipt = kv.erase(model, cache, freed.token_ids(ids), kv.Span(5, 9), eraser=eraser)
    with pytest.raises(kv.RestoreError, match="another cache"):
        kv.restore(prefill(model, ids), receipt)
    with torch.no_grad():
        model(token_ids(3), past_key_values=cache)
    before = states(cache)
    with pytest.raises(kv.RestoreError, match=r"3 token\(s\) were appended.*crop\(-3\)"):
        kv.restore(cache, receipt)
    assert same(states(cache), before)
    cache.crop(-3)
    kv.restore(cache, receipt)
    with pytest.raises(kv.RestoreError, match="restored before"):
        kv.restore(cache, receipt)


@pytest.mark.parametrize("method", [name for name in kv.methods() if name != "no-erase"])
@given(start=st.integers(0, 15), more=st.integers(1, 9))
def test_tokens_appended_since_are_kept_and_recomputed(method, start, more):
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(start, start + 4), method=method, eraser=random_eraser(model))
    later = token_ids(more, seed=3)
    with torch.no_grad():
        model(later, past_key_values=cache)
    whole = torch.cat([ids, later], 1)
    assert kv.restore(cache, receipt, model=model, token_ids=whole) == more
    assert same(states(cache), states(prefill(model, whole, [20])))


def test_a_restore_that_fails_leaves_the_cache_as_it_was():
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(3, 7), method="delete-and-shift")
    with torch.no_grad():
        model(token_ids(5), past_key_values=cache)
    before, marks = states(cache), get_marks(cache)

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            kv.restore(cache, receipt, model=model, token_ids=torch.cat([ids, token_ids(5)], 1))
    finally:
        hook.remove()
    assert same(states(cache), before)
    assert get_marks(cache) == marks


def test_the_seconds_of_an_erase_end_when_the_device_has_done_it(monkeypatch):
    model, ids = tiny(), token_ids(40)
    cache = prefill(model, ids)
    monkeypatch.setattr(TransformersBackend, "finish", lambda backend: time.sleep(0.1))
    assert kv.erase(model, cache, ids, kv.Span(8, 12), "delete-and-shift").seconds > 0.1


@pytest.mark.parametrize("what", [(3, 7), None, 5, [3, 7], "text", [], [(3, 7)], [kv.Span(1, 2), None], 1.5])
def test_what_is_no_span_is_refused_with_the_value_and_nothing_is_changed(what):
    model, ids = tiny("llama"), token_ids(12)
    cache = prefill(model, ids)
    before = states(cache)
    for call in (kv.erase, kv.readers):
        with pytest.raises(kv.SpanError) as caught:
            call(model, cache, ids, what)
        assert what == [] or str(what[0] if isinstance(what, list) and len(what) == 1 else what).strip("[]()") in str(
            caught.value
        )
    assert same(before, states(cache))


@pytest.mark.parametrize("wrong", [-1, 97, 1 << 40])
def test_an_id_that_the_model_does_not_have_is_refused_but_not_where_it_is_padding(wrong):
    model, ids = tiny("llama"), token_ids(12)
    cache = prefill(model, ids)
    bad = ids.clone()
    bad[0, 4] = wrong
    before = states(cache)
    with pytest.raises(kv.OptionError, match=str(wrong)):
        kv.erase(model, cache, bad, kv.Span(6, 8), "full-recompute")
    assert same(before, states(cache))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    padded = prefill(model, ids, mask=mask)
    bad = ids.clone()
    bad[0, 0] = -100
    assert kv.erase(model, padded, bad, kv.Span(6, 8), "delete-and-shift", mask).tokens_removed == 2


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bool])
def test_ids_that_are_no_integers_are_refused_and_never_rounded(kind):
    model, ids = tiny("llama"), token_ids(12)
    cache = prefill(model, ids)
    with pytest.raises(kv.OptionError, match="integers"):
        kv.erase(model, cache, ids.to(kind), kv.Span(3, 7))
    with pytest.raises(kv.OptionError, match="integers"):
        kv.erase(model, cache, [[1.5] * 12], kv.Span(3, 7))
    with pytest.raises(kv.OptionError, match="integers"):
        kv.erase(model, cache, ["a"] * 12, kv.Span(3, 7))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["kveraser", "full-recompute", "delete-and-shift"])
def test_under_autocast_nothing_is_edited_and_nothing_that_was_filled_under_it_is_called_exact(method, kind):
    model, ids = tiny("llama"), token_ids(24)
    plain, rounded = prefill(model, ids), DynamicCache()
    with torch.no_grad(), torch.autocast("cpu", kind):
        model(ids, past_key_values=rounded)
    before = states(plain), states(rounded)
    with torch.autocast("cpu", kind), pytest.raises(kv.CacheMismatchError, match="autocast"):
        kv.erase(model, plain, ids, kv.Span(3, 7), method)
    with pytest.raises(kv.CacheMismatchError, match="filled under torch.autocast"):
        kv.erase(model, rounded, ids, kv.Span(3, 7), method)
    assert same(before[0], states(plain))
    assert same(before[1], states(rounded))
    with torch.autocast("cpu", kind, enabled=False):
        assert kv.erase(model, plain, ids, kv.Span(3, 7), "full-recompute").exact


def test_a_plain_cache_refuses_to_bring_back_what_had_read_a_later_span():
    model, ids = tiny(), token_ids(60)
    cache = prefill(model, ids)
    before = states(cache)
    method = kv.Steering(kv.KVEraser.neutral(model), repair=0)
    older = kv.erase(model, cache, ids, kv.Span(30, 36), method=method)
    newer = kv.erase(model, cache, older.token_ids(ids), kv.Span(10, 12), method=method)
    with pytest.raises(kv.RestoreError, match="had read it"):
        kv.restore(cache, older)
    kv.restore(cache, newer)
    kv.restore(cache, older)
    assert same(states(cache), before)


def test_an_edit_before_all_later_ones_is_put_back_bit_for_bit():
    model, ids = tiny(), token_ids(60)
    cache = prefill(model, ids)
    before = states(cache)
    method = kv.Steering(kv.KVEraser.neutral(model), repair=0)
    older = kv.erase(model, cache, ids, kv.Span(10, 12), method=method)
    kv.erase(model, cache, older.token_ids(ids), kv.Span(30, 36), method=method)
    kv.restore(cache, older)
    assert same([t[:, :, :30] for t in states(cache)], [t[:, :, :30] for t in before])


@pytest.mark.parametrize("span", [(3, 7), None, 5, 3.5, "text", [None], [(3, 7)], []])
def test_something_that_is_no_span_is_refused_with_its_value(span):
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids, cache=growable_cache())
    before = states(cache)
    shown = "no span" if span == [] else re.escape(repr(span[0] if isinstance(span, list) else span).strip("()"))
    for call in (kv.erase, kv.readers):
        with pytest.raises(kv.SpanError, match=shown):
            call(model, cache, ids, span)
    assert same(states(cache), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda ids: ids.float(), r"float32 such as \["), (lambda ids: ids + 90, "outside the model's vocabulary of 97"),
     (lambda ids: ids - 90, "token id -"), (lambda ids: None, "got None"), (lambda ids: ids > 5, "bool")],
)  # fmt: skip
def test_ids_that_are_none_of_the_models_are_refused_with_a_value(change, words):
    model, ids = tiny(), token_ids(20)
    cache = prefill(model, ids, cache=growable_cache())
    before = states(cache)
    for call in (kv.erase, kv.readers):
        with pytest.raises(kv.OptionError, match=words):
            call(model, cache, change(ids), kv.Span(3, 7))
    assert same(states(cache), before)
