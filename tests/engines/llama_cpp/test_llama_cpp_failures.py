"""What cannot be done in llama.cpp is refused by name, and what fails leaves everything as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.engines import llama_cpp as engine
from kveraser.engines.llama_cpp import library
from kveraser.engines.llama_cpp import model as model_module
from kveraser.engines.llama_cpp.cells import LIVE
from kveraser.engines.llama_cpp.weights import gguf_fingerprint
from kveraser.errors import EngineError
from llama_cpp_helpers import ERASING, QUESTION, Pair, bits, equal, failing_decode, ids_of, read, tiny_pair


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ERASING)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_forward_leaves_cells_and_ledger_as_they_were(pair, method, at, error):
    context = pair.context()
    span = read(context)[1]
    before, logits = bits(context), context.logits_ids(QUESTION)
    try:
        with failing_decode(context, at, error):
            context.erase(span, method)
    except error:
        assert equal(bits(context), before)
        assert context.erased == ()
        assert context.exact
    if not context.erased:
        assert torch.equal(context.logits_ids(QUESTION), logits)
        context.erase(span, method)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("first", "second", "call", "bit_exact"), [(1, 3, "write", True), (3, 1, "_decode", False)])
def test_a_failing_restore_of_an_older_edit_leaves_it_erased_and_every_cell_as_it_was(
    pair, monkeypatch, first, second, call, bit_exact, error
):
    context = pair.context()
    spans = read(context, (20, 4, 20, 4, 30))
    older = context.erase(spans[first])
    context.erase(spans[second])
    before, marks, erased = bits(context), context.backend.marks, context.erased
    calls, real = [], getattr(context.backend.cells, call)

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise error("stop")
        return real(*arguments)

    monkeypatch.setattr(context.backend.cells, call, failing)
    with pytest.raises(error):
        context.restore(older)
    assert equal(bits(context), before)
    assert (context.backend.marks, context.erased) == (marks, erased)
    assert context.restore(older).bit_exact == bit_exact


def test_a_failing_append_leaves_the_context_as_it_was(pair, monkeypatch):
    context = pair.context(length=2000)
    read(context)
    before, decode, calls = bits(context), context.backend.cells._decode, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        decode(*arguments)

    monkeypatch.setattr(context.backend.cells, "_decode", failing)
    with pytest.raises(RuntimeError):
        context.append(ids_of(700))
    assert bits(context) == before
    assert len(context) == 78


BAD_ERASES = [
    (lambda c: c.erase(kv.Span(70, 90)), kv.SpanError, "ends after"),
    (lambda c: c.erase([]), kv.SpanError, "no span"),
    (lambda c: c.erase([kv.Span(1, 4), kv.Span(3, 6)]), kv.SpanError, "overlap"),
    (lambda c: c.erase("nowhere to be found"), kv.SpanError, "not in the context"),
    (lambda c: c.erase(3), kv.SpanError, "int"),
    (lambda c: c.erase(kv.Span(1, 3), "selective-recompute"), kv.OptionError, "llama.cpp"),
    (lambda c: c.erase(kv.Span(1, 3), "forget"), kv.OptionError, "there is no"),
    (lambda c: c.erase(kv.Span(5, 9), "kveraser:window=2,0"), kv.OptionError, "local"),
    (lambda c: c.append([]), kv.ContextError, "nothing"),
    (lambda c: c.append(""), kv.ContextError, "nothing"),
    (lambda c: c.append([3, 100000]), kv.ContextError, "100000"),
    (lambda c: c.append([-1]), kv.ContextError, "-1"),
    (lambda c: c.append(ids_of(600)), kv.ContextError, "do not fit"),
    (lambda c: c.logits_ids([]), kv.ContextError, "nothing"),
    (lambda c: c.logits_ids(ids_of(600)), kv.ContextError, "do not fit"),
    (lambda c: c.generate_ids([1], max_new_tokens=600), kv.ContextError, "do not fit"),
    (lambda c: c.generate_ids([1], max_new_tokens=0), kv.OptionError, "at least 1"),
    (lambda c: c.generate_ids([1], top_p=0), kv.OptionError, "top_p"),
    (lambda c: c.backend.cells.run([1], 3, LIVE), EngineError, "gaps"),
    (lambda c: c.backend.cells.share(0, 7, kv.Span(0, 1)), EngineError, "no sequence 7"),
    (lambda c: c.backend.cells.move(LIVE, kv.Span(0, 4), -2), EngineError, "before position 0"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_ERASES)
def test_bad_input_is_named_and_changes_nothing(pair, call, error, words):
    context = pair.context()
    read(context)
    before = bits(context)
    with pytest.raises(error, match=words):
        call(context)
    assert bits(context) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "0 tokens"),
        ({"length": 10**6}, "trained on"),
        ({"keys": "bf16"}, "bf16"),
        ({"values": "q8_0", "flash_attention": False}, "flash attention"),
    ],
)
def test_impossible_caches_are_refused(pair, options, words):
    with pytest.raises(kv.OptionError, match=words):
        engine.LlamaCppContext(pair.model, pair.found, **options)


def test_heads_that_no_block_divides_refuse_quantised_caches(llama_folder, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
    file = llama_folder / "odd.gguf"
    tiny_pair(file, head=16)
    with pytest.raises(kv.OptionError, match="multiple of 32"):
        engine.LlamaCppContext(engine.LlamaCppModel(file, threads=1), length=64, keys="q8_0")


def test_quantised_keys_that_llama_cpp_cannot_rotate_are_not_moved(llama_folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
    (llama_folder / "narrow").mkdir()
    narrow = Pair(llama_folder / "narrow", head=32)
    context = narrow.context("q8_0")
    span = read(context)[1]
    before = bits(context)
    for method in ("kveraser", "delete-and-shift"):
        with pytest.raises(kv.OptionError, match="cannot be moved"):
            context.erase(span, method)
        assert bits(context) == before
    context.erase(span, "kveraser:repair=0")
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with pytest.raises(kv.OptionError, match="LLAMA_ATTN_ROT_DISABLE"):
        context = pair.context("q8_0")
        context.erase(read(context)[1], "delete-and-shift")


def test_moving_quantised_keys_makes_the_whole_cache_approximate(pair):
    context = pair.context("q8_0")
    span = read(context)[1]
    context.erase(span, "delete-and-shift")
    assert context.backend.marks.approximate_from == 0
    receipt = context.erase(kv.Span(60, 63), "full-recompute")
    assert receipt.tokens_recomputed == 67


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        ("llama_model_n_swa", 512, "sliding window"),
        ("llama_model_is_recurrent", True, "recurrent"),
        ("llama_model_is_hybrid", True, "recurrent"),
        ("llama_model_has_encoder", True, "encoder"),
        ("llama_model_rope_type", 8, "rotary"),
    ],
)
def test_models_whose_cache_cannot_be_edited_are_refused_by_name(pair, monkeypatch, function, value, words):
    monkeypatch.setattr(library.lib, function, lambda _: value)
    with pytest.raises(kv.UnsupportedCacheError, match=words):
        engine.LlamaCppModel(pair.file)


def test_files_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(kv.BackboneError, match="no GGUF file"):
        engine.LlamaCppModel(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(kv.BackboneError, match="cannot load"):
        engine.LlamaCppModel(tmp_path / "bad.gguf")
    with pytest.raises(kv.BackboneError):
        gguf_fingerprint(tmp_path / "bad.gguf", "llama")


def test_an_eraser_of_another_backbone_is_refused(llama_folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
    with pytest.raises(kv.EraserMismatchError, match="no eraser ships"):
        pair.model.find_eraser()
    file = llama_folder / "wide.gguf"
    tiny_pair(file, layers=2)
    with pytest.raises(kv.EraserMismatchError, match="num_hidden_layers"):
        engine.LlamaCppModel(file, threads=1).find_eraser(pair.folder)
    with pytest.raises(kv.EraserMismatchError, match="cannot load"):
        engine.LlamaCppModel(file, threads=1).load_adapter(pair.found)


def test_a_fine_tune_of_the_backbone_needs_a_word(llama_folder, pair, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
    fingerprint = replace(pair.found.config.fingerprint, weights=[0.5] * 32)
    monkeypatch.setattr(model_module, "gguf_fingerprint", lambda *_: fingerprint)
    with pytest.raises(kv.EraserMismatchError, match="check_weights"):
        pair.model.find_eraser(pair.folder)
    assert pair.model.find_eraser(pair.folder, check_weights=False).rank == 4


def test_an_exported_eraser_is_kept_and_a_damaged_one_made_again(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    first = pair.model.find_eraser(pair.folder)
    stamp = first.file.stat().st_mtime_ns
    assert pair.model.find_eraser(pair.folder).file.stat().st_mtime_ns == stamp
    first.file.write_bytes(b"GGUF?")
    assert pair.model.find_eraser(pair.folder).config == first.config


def test_a_library_with_other_defaults_is_not_trusted(monkeypatch):
    parameters = library.lib.llama_context_default_params()
    parameters.n_ubatch = 77
    monkeypatch.setattr(library.lib, "llama_context_default_params", lambda: parameters)
    with pytest.raises(EngineError, match="n_ubatch is 77"):
        library.check_defaults()
