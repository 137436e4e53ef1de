"""The steering pass: windows, causality, memory, transactions, repair."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

import kveraser as kv
from conftest import (
    FAMILIES,
    prefill,
    random_eraser,
    relative,
    same,
    states,
    tiny,
    token_ids,
)
from kveraser.cache import PREFILL_CHUNK, get_marks, growable_cache, window_spans
from kveraser.model.rope import frequencies, rotary_layout, rotate


class LargestAllocation(TorchDispatchMode):
    """The largest new tensor, in bytes, that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("family", FAMILIES)
@given(start=st.integers(0, 30), size=st.integers(1, 12), window=st.tuples(st.integers(0, 8), st.integers(0, 12)))
def test_a_windowed_pass_equals_a_pass_with_an_explicit_mask(family, start, size, window):
    model = tiny(family)
    span = kv.Span(start, start + size)
    ids = token_ids(span.end + 3)
    eraser = random_eraser(model)
    cache = prefill(model, ids)
    past = prefill(model, ids[:, :start]) if start else DynamicCache()
    visible = torch.zeros(size, span.end, dtype=torch.bool)
    for run in window_spans(window, start):
        visible[:, run.slice] = True
    visible[:, span.slice] = torch.ones(size, size, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        eraser.attached(model)(
            ids[:, span.slice], position_ids=torch.arange(start, span.end)[None], past_key_values=past,
            attention_mask=mask[None, None],
        )  # fmt: skip
    kv.erase(model, cache, ids, span, method=kv.Steering(eraser, window=window))
    got = [tensor[:, :, span.slice] for tensor in states(cache)]
    assert relative(got, [tensor[:, :, span.slice] for tensor in states(past)]) < 1e-5


@given(st.integers(1, 30), st.integers(0, 9))
def test_a_window_that_covers_the_prefix_equals_no_window(start, more):
    model, ids = tiny(), token_ids(start + 12)
    span = kv.Span(start, start + 6)
    eraser = random_eraser(model)
    results = []
    for method in (
        kv.Steering(eraser),
        kv.Steering(eraser, window=(start, 0)),
        kv.Steering(eraser, window=(0, start + more)),
    ):
        cache = prefill(model, ids)
        kv.erase(model, cache, ids, span, method=method)
        results.append(states(cache))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_the_erasers_own_window_is_used_unless_another_is_asked_for():
    model, ids, span = tiny(), token_ids(40), kv.Span(20, 26)
    windowed = random_eraser(model, window=(2, 4))
    results = []
    for method in (windowed, kv.Steering(windowed, window=(2, 4)), kv.Steering(windowed, full_prefix=True)):
        cache = prefill(model, ids)
        kv.erase(model, cache, ids, span, method=method)
        results.append(states(cache))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, (2, 5)])
def test_span_tokens_never_see_later_span_tokens(family, window):
    model, span = tiny(family), kv.Span(10, 18)
    eraser = random_eraser(model, window=window)
    ids = token_ids(30)
    changed = ids.clone()
    changed[0, 15] = (changed[0, 15] + 11) % 90 + 3
    written = []
    for these in (ids, changed):
        cache = prefill(model, ids)
        kv.erase(model, cache, these, span, eraser=eraser)
        written.append(states(cache))
    for old, new in zip(*written, strict=True):
        assert torch.equal(old[:, :, 10:15], new[:, :, 10:15])
        assert not torch.equal(old[:, :, 15:18], new[:, :, 15:18])


@pytest.mark.parametrize("make_cache", [DynamicCache, growable_cache], ids=["DynamicCache", "growable"])
def test_with_a_window_nothing_grows_with_the_context(make_cache):
    model = tiny()
    eraser = random_eraser(model, window=(4, 32))
    largest = {}
    for length in (1024, 8192):
        ids = token_ids(length)
        cache = make_cache()
        generator = torch.Generator().manual_seed(0)
        for index in range(3):
            pair = torch.randn(2, 1, 2, length, 8, generator=generator)
            cache.update(pair[0], pair[1], index)
        span = kv.Span(length // 4, length // 4 + 64)
        before = states(cache)
        kv.erase(model, cache, ids, span, eraser=eraser)  # the first use of an eraser checks it against the model
        with LargestAllocation() as seen:
            kv.erase(model, cache, ids, kv.Span(span.end, span.end + 64), eraser=eraser)
        largest[length] = seen.largest
        for old, new in zip(before, states(cache), strict=True):
            assert torch.equal(old[:, :, : span.start], new[:, :, : span.start])
            assert torch.equal(old[:, :, span.end + 64 :], new[:, :, span.end + 64 :])
    assert largest[1024] == largest[8192] > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "method", [name for name in kv.methods() if name not in ("no-erase", "delete-and-shift")]
)  # these two run no token
@given(fail_at=st.integers(0, 2), start=st.integers(1, 20))
def test_an_erase_that_fails_in_any_layer_leaves_the_cache_as_it_was(method, error, fail_at, start):
    model, ids = tiny(), token_ids(30)
    eraser = random_eraser(model)
    for cache in (prefill(model, ids), prefill(model, ids, cache=growable_cache())):
        before, marks = states(cache), get_marks(cache)
        chosen = kv.Auto(eraser, costs=_always_steer()) if method == "auto" else method
        rotary_layout(model)  # its probe runs the model as well

        def fail(*_):
            raise error("stop")

        hook = model.model.layers[fail_at].self_attn.register_forward_hook(fail)
        try:
            with pytest.raises(error):
                kv.erase(model, cache, ids, kv.Span(start, start + 5), method=chosen, eraser=eraser)
        finally:
            hook.remove()
        assert same(states(cache), before)
        assert get_marks(cache).approximate_from == marks.approximate_from
        assert get_marks(cache).steered == marks.steered


def _always_steer():
    from kveraser.methods.cost_model import CostModel, PassCost

    return CostModel(PassCost(10.0, 1.0, 0.0), PassCost(0.0, 0.0, 0.0))


@given(st.integers(0, 20), st.sampled_from([None, (0, 3), (2, 8), (4, 30)]))
def test_repair_recomputes_the_first_tokens_behind_the_span_as_if_it_had_never_been_there(tokens, window):
    model, ids, span = tiny(), token_ids(30), kv.Span(8, 14)
    eraser = random_eraser(model, window=window)
    plain, repaired = prefill(model, ids), prefill(model, ids)
    kv.erase(model, plain, ids, span, method=kv.Steering(eraser))
    receipt = kv.erase(model, repaired, ids, span, method=kv.Steering(eraser, repair=tokens, choose="next"))
    count = min(tokens, 16)
    assert receipt.tokens_recomputed == 6 + count
    for a, b in zip(states(plain), states(repaired), strict=True):
        assert torch.equal(a[:, :, :8], b[:, :, :8])
        assert relative([b[:, :, 8:14]], [a[:, :, 8:14]]) < 1e-5  # one pass computes both: other rounding
        assert torch.equal(a[:, :, 14 + count :], b[:, :, 14 + count :])
    if count:
        past = prefill(model, ids[:, :8])
        visible = torch.zeros(count, 8 + count, dtype=torch.bool)
        for run in window_spans(window, 8):
            visible[:, run.slice] = True
        visible[:, 8:] = torch.ones(count, count, dtype=torch.bool).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        where = torch.arange(8, 8 + count)[None]
        with torch.no_grad():
            model(ids[:, 14 : 14 + count], position_ids=where, past_key_values=past, attention_mask=mask)
        for layer, near in zip(repaired.layers, past.layers, strict=True):
            keys = rotate(near.keys[:, :, 8:], 6, frequencies(model))
            assert relative([layer.keys[:, :, 14 : 14 + count]], [keys]) < 1e-5
            assert relative([layer.values[:, :, 14 : 14 + count]], [near.values[:, :, 8:]]) < 1e-5


def steered(model, ids, spans, method, mask=None):
    """The states after steering, and how many forwards it took."""
    cache, forwards = prefill(model, ids, mask=mask), []
    rotary_layout(model)  # its probe runs the model as well
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    try:
        kv.erase(model, cache, ids, spans, method=method, attention_mask=mask)
    finally:
        hook.remove()
    return states(cache), len(forwards)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    st.lists(st.integers(1, 8), min_size=4, max_size=4), st.integers(0, 9), st.sampled_from([(0, 4), (2, 8), (3, 60)])
)
def test_several_spans_in_one_pass_are_those_of_one_pass_each_from_left_to_right(family, sizes, repair, window):
    model = tiny(family)
    eraser = random_eraser(model, window=window)
    first = kv.Span(sizes[0], sizes[0] + sizes[1])
    second = kv.Span(first.end + sizes[2], first.end + sizes[2] + sizes[3])
    ids = token_ids(second.end + 12)
    method = kv.Steering(eraser, repair=repair, choose="next")
    together, _ = steered(model, ids, [first, second], method)
    cache = prefill(model, ids)
    kv.erase(model, cache, ids, first, method=kv.Steering(eraser, repair=min(repair, sizes[2]), choose="next"))
    kv.erase(model, cache, ids, second, method=method)
    assert relative(together, states(cache)) < 1e-5


def test_near_spans_with_a_window_share_a_pass_and_distant_ones_do_not():
    model = tiny()
    eraser = random_eraser(model, window=(2, 16), repair=4, choose="next")
    ids = token_ids(600)
    assert steered(model, ids, [kv.Span(40, 48), kv.Span(56, 64)], kv.Steering(eraser))[1] == 1
    far = [kv.Span(start, start + 40) for start in range(40, 600, 80)]
    assert 1 < steered(model, ids, far, kv.Steering(eraser))[1] <= len(far)
    assert steered(model, ids, [kv.Span(40, 48), kv.Span(56, 64)], kv.Steering(eraser, full_prefix=True))[1] == 2


@pytest.mark.parametrize("window", [None, (2, 16)])
def test_a_long_span_is_steered_in_chunks_that_see_what_came_before(window):
    model, span = tiny(), kv.Span(20, 20 + 2 * PREFILL_CHUNK + 7)
    eraser = random_eraser(model, window=window)
    ids = token_ids(span.end + 30)
    found, forwards = steered(model, ids, [span], kv.Steering(eraser, repair=5, choose="next"))
    assert forwards == 3
    past = prefill(model, ids[:, : span.start])
    visible = torch.ones(len(span), span.end, dtype=torch.bool).tril(span.start)
    visible[:, : span.start] = False
    for run in window_spans(window, span.start):
        visible[:, run.slice] = True
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        eraser.attached(model)(
            ids[:, span.slice], position_ids=torch.arange(span.start, span.end)[None], past_key_values=past,
            attention_mask=mask[None, None],
        )  # fmt: skip
    own = [tensor[:, :, span.slice] for tensor in found]
    assert relative(own, [tensor[:, :, span.slice] for tensor in states(past)]) < 1e-5


@given(st.integers(1, 6))
def test_repair_in_a_padded_batch_is_that_of_every_row_alone(padding):
    model, eraser = tiny(), random_eraser(tiny())
    rows = token_ids(30, rows=2)
    mask = torch.ones_like(rows)
    mask[1, :padding] = 0
    cache = prefill(model, rows, mask=mask)
    method = kv.Steering(eraser, repair=5, choose="next")
    kv.erase(model, cache, rows, kv.Span(10, 16), method=method, attention_mask=mask)
    alone = prefill(model, rows[1:, padding:])
    kv.erase(model, alone, rows[1:, padding:], kv.Span(10 - padding, 16 - padding), method=method)
    found = [tensor[1:, :, padding:] for tensor in states(cache)]
    assert relative(found, states(alone)) < 1e-4


def test_erasing_from_several_threads_with_one_eraser_is_safe():
    model = tiny()
    eraser = random_eraser(model)
    expected, results = {}, {}
    for seed in range(4):
        ids = token_ids(40, seed=seed)
        cache = prefill(model, ids)
        kv.erase(model, cache, ids, kv.Span(10, 20), eraser=eraser)
        expected[seed] = states(cache)

    def work(seed):
        ids = token_ids(40, seed=seed)
        for _ in range(5):
            cache = prefill(model, ids)  # the plain model runs at the same time in other threads
            kv.erase(model, cache, ids, kv.Span(10, 20), eraser=eraser)
        results[seed] = states(cache)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert same(results[seed], expected[seed])
