"""Putting back what an edit kept: into the very rows that it was taken from, or not at all."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv
from conftest import CACHES, prefill, random_eraser, same, states, tiny, token_ids
from kveraser.cache import TransformersBackend, get_marks

METHODS = ["kveraser", "delete-and-shift", "full-recompute"]
MOVES = {
    "dropped": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "the other alone": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "one twice": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
}


def edited(kind, method, *spans):
    """A cache of two rows, the ids that go with it, and the receipts of some edits."""
    model, ids = tiny(), token_ids(40, 2)
    cache, receipts = prefill(model, ids, cache=CACHES[kind]()), []
    for span in spans:
        receipts.append(kv.erase(model, cache, ids, span, method, eraser=random_eraser(model)))
        ids = receipts[-1].token_ids(ids)
    return cache, ids, receipts


@pytest.mark.parametrize("kind", sorted(CACHES))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("move", MOVES)
def test_what_was_kept_of_other_rows_is_not_put_back_and_nothing_is_changed(move, method, kind):
    cache, _, (receipt,) = edited(kind, method, kv.Span(10, 16))
    MOVES[move](cache)
    before = states(cache)
    with pytest.raises(kv.RestoreError, match="rows of the batch were reordered, repeated or dropped since"):
        kv.restore(cache, receipt)
    assert same(states(cache), before)


@settings(max_examples=5)
@given(st.sampled_from(sorted(CACHES)), st.sampled_from(METHODS), st.integers(0, 3))
def test_rows_that_are_put_back_first_are_restored_with_what_was_appended_since(kind, method, more):
    cache, _, (receipt,) = edited(kind, method, kv.Span(10, 16))
    fresh, ids = prefill(tiny(), token_ids(40, 2)), token_ids(40 + more, 2)
    ids[:, :40] = token_ids(40, 2)
    if more:
        with torch.no_grad():
            tiny()(ids[:, 40:], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    before = states(cache)
    with pytest.raises(kv.RestoreError, match="rows of the batch"):
        kv.restore(cache, receipt, model=tiny(), token_ids=ids)
    assert same(states(cache), before)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert kv.restore(cache, receipt, model=tiny(), token_ids=ids) == more
    assert same([tensor[:, :, :40] for tensor in states(cache)], states(fresh))


def test_rows_that_moved_between_two_edits_are_those_of_the_later_one_alone():
    cache, ids, (first,) = edited("DynamicCache", "kveraser", kv.Span(10, 16))
    cache.reorder_cache(torch.tensor([1, 0]))
    ids, before = ids.flip(0), states(cache)
    last = kv.erase(tiny(), cache, ids, kv.Span(20, 24), eraser=random_eraser(tiny()))
    after = states(cache)
    with pytest.raises(kv.RestoreError, match="rows of the batch"):
        kv.restore(cache, first)
    assert same(states(cache), after)
    kv.restore(cache, last)
    assert same(states(cache), before)
    with pytest.raises(kv.RestoreError, match="rows of the batch"):
        kv.restore(cache, first)


@pytest.mark.parametrize("kind", sorted(CACHES))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_restore_that_fails_while_it_puts_back_leaves_the_cache_as_it_was(error, method, kind):
    cache, _, receipts = edited(kind, method, kv.Span(10, 16), kv.Span(30, 34))
    before, marks, put_all = states(cache), get_marks(cache), TransformersBackend.put_all
    fails = [True]

    def once(backend, regions):
        if fails.pop() if fails else False:
            raise error
        put_all(backend, regions)

    with patch.object(TransformersBackend, "put_all", once), pytest.raises(error):
        kv.restore(cache, receipts[-1])
    assert same(states(cache), before)
    assert get_marks(cache) == marks
    undone = copy.deepcopy(cache)
    for receipt in reversed(receipts):
        kv.restore(undone, receipt)
    assert same(states(undone), states(prefill(tiny(), token_ids(40, 2))))
