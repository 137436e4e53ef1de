"""The growable layer does what `DynamicLayer` does, without copying itself for every token."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import kveraser as kv
from conftest import same, states, tiny, token_ids
from kveraser.cache import GrowableLayer, growable_cache

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 30)),
        st.tuples(st.just("crop"), st.integers(0, 20)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@given(OPERATIONS)
def test_any_sequence_of_operations_gives_what_the_plain_layer_gives(operations):
    plain, growable = DynamicCache(), growable_cache()
    generator = torch.Generator().manual_seed(0)
    rows = 2
    for name, value in operations:
        empty = plain.get_seq_length() == 0
        if name == "update":
            keys, values = torch.randn(2, rows, 2, value, 4, generator=generator)
            for cache in (plain, growable):
                got = cache.update(keys.clone(), values.clone(), 0)
            assert torch.equal(got[0], plain.layers[0].keys)
        elif empty or (name in ("repeat",) and rows > 8):
            continue
        elif name == "reset":
            plain = DynamicCache()  # older transformers keep zeroed slots on reset
            growable.reset()
            rows = 2
        elif name == "crop":
            for cache in (plain, growable):
                cache.crop(-min(value, cache.get_seq_length()))
        elif name == "reorder":
            order = torch.randint(0, rows, (rows,), generator=generator)
            for cache in (plain, growable):
                cache.reorder_cache(order)
        elif name == "repeat":
            for cache in (plain, growable):
                cache.batch_repeat_interleave(value)
            rows *= value
        elif name == "select":
            chosen = torch.randint(0, rows, (max(1, value % (rows + 1)),), generator=generator)
            for cache in (plain, growable):
                cache.batch_select_indices(chosen)
            rows = len(chosen)
        elif name == "copy":
            growable = copy.deepcopy(growable)
        assert growable.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert same(states(growable), states(plain))


def test_appending_token_by_token_copies_a_logarithmic_number_of_times():
    layer = GrowableLayer()
    moves, address = 0, None
    for _ in range(2000):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        moves += layer.keys.data_ptr() != address
        address = layer.keys.data_ptr()
    assert layer.get_seq_length() == 2000
    assert moves < 12
    assert layer.capacity < 2000 * 1.5 + 1


def test_cropping_and_refilling_needs_no_new_memory():
    layer = GrowableLayer()
    layer.update(torch.ones(1, 1, 50, 2), torch.ones(1, 1, 50, 2))
    address = layer.keys.data_ptr()
    layer.crop(-20)
    layer.update(torch.zeros(1, 1, 20, 2), torch.zeros(1, 1, 20, 2))
    assert layer.keys.data_ptr() == address
    assert layer.keys[0, 0, :, 0].sum() == 30


def test_a_deep_copy_holds_nothing_that_was_cropped():
    layer = GrowableLayer()
    layer.update(torch.full((1, 1, 50, 2), 7.0), torch.full((1, 1, 50, 2), 7.0))
    layer.crop(-49)
    assert copy.deepcopy(layer).capacity == 1
    layer.wipe_spare()
    assert (layer._buffers[0] == 7).sum() == 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_gives_the_same_tokens_as_with_the_plain_cache(options):
    model, ids = tiny(), token_ids(12)
    results = []
    for cache in (DynamicCache(), growable_cache()):
        torch.manual_seed(0)
        results.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, attention_mask=torch.ones_like(ids),
                                      **{"do_sample": False, **options}))  # fmt: skip
    assert torch.equal(*results)


def test_it_works_across_inference_mode_borders():
    model, ids = tiny(), token_ids(10)
    cache = growable_cache()
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, 6:8], past_key_values=cache)
    with torch.inference_mode():
        model(ids[:, 8:], past_key_values=cache)
    fresh = DynamicCache()
    with torch.no_grad():
        for a, b in ((0, 6), (6, 8), (8, 10)):
            model(ids[:, a:b], past_key_values=fresh)
    assert same(states(cache), states(fresh))


def test_states_with_gradients_are_refused_by_name():
    with pytest.raises(kv.UnsupportedCacheError, match="no gradients"):
        GrowableLayer().update(torch.ones(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("count", [10, 64])  # with room left, and without
def test_states_of_another_number_of_rows_are_refused_and_never_broadcast(count):
    layer = GrowableLayer()
    layer.update(torch.ones(1, 1, count, 2), torch.ones(1, 1, count, 2))
    with pytest.raises(kv.CacheMismatchError, match=r"2 row\(s\).*has 1"):
        layer.update(torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    assert layer.keys.shape == (1, 1, count, 2)
