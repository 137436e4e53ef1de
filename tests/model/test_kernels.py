"""Attention kernels: cuDNN's are off in every forward of ours, and as they were elsewhere."""

from __future__ import annotations

from threading import Event, Thread

import pytest
import torch
from torch.backends import cuda

import kveraser as kv
from conftest import make_tokenizer, prefill, text_model, token_ids
from kveraser.cache import prefill_chunk
from kveraser.model.kernels import without_cudnn
from kveraser.readers import calibrate
from kveraser.training.rows import Segment, run_row, slot_range


@pytest.fixture(params=[True, False], ids=["on", "off"])
def before(request):
    was = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(request.param)
    yield request.param
    cuda.enable_cudnn_sdp(was)


def test_the_switch_is_as_it_was_after_the_last_of_nested_blocks_and_after_an_error(before):
    with without_cudnn():
        with pytest.raises(ZeroDivisionError), without_cudnn():
            _ = 1 / 0
        assert not cuda.cudnn_sdp_enabled()
    assert cuda.cudnn_sdp_enabled() == before


def test_threads_whose_blocks_overlap_leave_it_as_it_was(before):
    inside, leave = Event(), Event()

    def long_block():
        with without_cudnn():
            inside.set()
            leave.wait(10)

    thread = Thread(target=long_block)
    with without_cudnn():
        thread.start()
        assert inside.wait(10)
    assert not cuda.cudnn_sdp_enabled()  # the other thread's block goes on
    leave.set()
    thread.join()
    assert cuda.cudnn_sdp_enabled() == before


def test_every_forward_of_ours_runs_without_cudnn(before):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments, **options):
        seen.append(cuda.cudnn_sdp_enabled())
        return real(*arguments, **options)

    model = text_model()
    cache = prefill(model, token_ids(30))
    context = kv.ErasableContext(model, make_tokenizer())
    steps = {
        "read": lambda: context.append_ids(token_ids(40)[0]),
        "erase": lambda: context.erase(kv.Span(8, 12), "kveraser:repair=4"),
        "recompute": lambda: context.erase(kv.Span(20, 22), "full-recompute"),
        "answer": lambda: context.generate_ids(token_ids(3)[0], max_new_tokens=2),
        "erase from a cache of the user's": lambda: kv.erase(
            model, cache, token_ids(30), kv.Span(8, 12), "local-suffix-repair:tokens=4"
        ),
        "calibrate": lambda: calibrate(model, token_ids(256)[0].tolist()),
        "train": lambda: run_row(model, [Segment.run([5, 6, 7], 0, slot_range(0, 0))], []),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        for name, step in steps.items():
            seen.clear()
            step()
            assert not any(seen), name
            assert seen or name == "erase", name  # readers attend by a function of ours
    assert cuda.cudnn_sdp_enabled() == before


def test_a_long_prefill_runs_more_tokens_at_once_where_a_forward_is_slow_to_start():
    assert prefill_chunk(torch.device("cpu")) < prefill_chunk(torch.device("cuda"))
