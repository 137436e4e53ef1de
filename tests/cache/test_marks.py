"""What an edited cache remembers when it was cropped and filled again since, whatever its edits were."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from conftest import CACHES, prefill, random_eraser, same, states, tiny, token_ids
from kveraser.cache import get_marks


@torch.no_grad()
def go_on(cache, ids, crop, more, seed=3):
    """Crop a cache by some tokens and let others follow; the ids that go with it then."""
    length, new = ids.shape[1] - crop, token_ids(more, seed=seed)
    if crop:
        cache.crop(-crop)
        new[0, 0] = ids[0, length] % 90 + 3  # another one than was there
    tiny()(new, past_key_values=cache, position_ids=torch.arange(length, length + more)[None])
    return torch.cat([ids[:, :length], new], 1)


@pytest.mark.parametrize("kind", sorted(CACHES))
@settings(max_examples=8)
@given(st.integers(2, 20), st.integers(0, 14), st.integers(1, 30), st.sampled_from(["kveraser", "delete-and-shift"]))
def test_an_older_edit_behind_which_the_cache_was_cropped_is_forgotten_with_the_newer_one(
    kind, size, crop, more, method
):
    """The newest leaves a shorter cache than the older one did."""
    model, eraser, ids = tiny(), random_eraser(tiny()), token_ids(60)
    cache = prefill(model, ids, cache=CACHES[kind]())
    first = kv.erase(model, cache, ids, kv.Span(20, 24), method, eraser=eraser)
    ids = first.token_ids(ids)
    last = kv.erase(model, cache, ids, kv.Span(ids.shape[1] - size, ids.shape[1]), eraser=eraser)
    ids = go_on(cache, last.token_ids(ids), crop, more)
    known = {edit.id for edit in get_marks(cache).edits}
    assert known == (set() if crop else {first.id, last.id})
    before, undone = states(cache), copy.deepcopy(cache)
    with kv.reading(model, cache):
        pass
    if crop:
        for receipt in (first, last):
            with pytest.raises(kv.RestoreError, match="cropped since"):
                kv.restore(cache, receipt)
        assert same(states(cache), before)
    else:
        with pytest.raises(kv.RestoreError, match="appended"):
            kv.restore(undone, last)
    again = kv.erase(model, cache, ids, kv.Span(5, 8), method, eraser=eraser)
    kv.restore(cache, again)
    assert same(states(cache), before)


@pytest.mark.parametrize("method", ["kveraser", "delete-and-shift"])
def test_a_context_whose_end_was_erased_behind_an_older_edit_replies_without_new_text(method):
    context = kv.ErasableContext(tiny(), eraser=random_eraser(tiny()))
    context.append_ids(token_ids(60)[0])
    receipts = [context.erase_spans(span, method) for span in (kv.Span(30, 34), kv.Span(59, 60))]
    before = states(context.cache)
    assert context.reply_ids(max_new_tokens=4) == context.generate_ids(max_new_tokens=4)
    assert same(states(context.cache), before)
    assert all(context.restore(receipt).bit_exact for receipt in reversed(receipts))
