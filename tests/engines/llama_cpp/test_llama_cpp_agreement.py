"""What llama.cpp erases is what transformers erases, with tiny random models that both have."""

from __future__ import annotations

import pytest

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.engines.llama_cpp.weights import gguf_fingerprint
from kveraser.model.fingerprint import Fingerprint
from llama_cpp_helpers import ERASING, QUESTION, Pair, ids_of, read


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "method", ["no-erase", *ERASING, "kveraser:repair=0", "kveraser:full_prefix=true", "kveraser:window=0,3"]
)
def test_log_probabilities_are_those_of_transformers(llama_folder, pair, family, method, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
    both = (
        pair if family == "llama" else Pair(llama_folder / f"{family}", family) if _made(llama_folder, family) else None
    )
    ours, theirs = both.context(), kv.ErasableContext(both.backbone, eraser=both.eraser)
    for context in (ours, theirs):
        spans = read(context)
        context.erase(spans[1], method)
        context.append(ids_of(4, seed=5))
    found = ours.logits_ids(QUESTION).log_softmax(-1)
    wanted = theirs.logits_ids(QUESTION).log_softmax(-1)
    assert (found - wanted).abs().max() < 2e-3, (found - wanted).abs().max()
    assert ours.exact == theirs.exact
    assert ours.live_ids == theirs.live_ids


def _made(folder, family):
    (folder / family).mkdir(exist_ok=True)
    return True


def test_several_spans_in_one_erase_are_those_of_transformers(pair):
    ours, theirs = pair.context(), kv.ErasableContext(pair.backbone, eraser=pair.eraser)
    for context in (ours, theirs):
        spans = read(context, (20, 5, 3, 6, 30))
        context.erase([spans[1], spans[3]])
    difference = ours.logits_ids(QUESTION).log_softmax(-1) - theirs.logits_ids(QUESTION).log_softmax(-1)
    assert difference.abs().max() < 2e-3


def test_receipts_say_the_same_as_those_of_transformers(pair):
    ours, theirs = pair.context(), kv.ErasableContext(pair.backbone, eraser=pair.eraser)
    for method in ("no-erase", *ERASING):
        found, wanted = (context.erase(read(context)[1], method) for context in (ours, theirs))
        for name in ("method", "spans", "exact", "tokens_removed", "tokens_recomputed", "removed", "steered"):
            assert getattr(found, name) == getattr(wanted, name), (method, name)


def test_the_gguf_file_has_the_fingerprint_of_the_transformers_model(llama_folder, pair):
    assert gguf_fingerprint(pair.file, "llama") == Fingerprint.of(pair.backbone)
