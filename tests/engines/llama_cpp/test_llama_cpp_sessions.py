"""Contexts of llama.cpp in files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.context.session_folder import read_session, write_session
from kveraser.engines import llama_cpp as engine
from llama_cpp_helpers import CACHES, QUESTION, bits, ids_of, read


@pytest.mark.parametrize("cache", CACHES)
def test_a_saved_context_goes_on_as_if_it_had_never_been_saved(pair, tmp_path, cache):
    context = pair.context(cache)
    spans = read(context, (20, 5, 10, 6, 30))
    context.erase(spans[3], "delete-and-shift")
    receipt = context.erase(spans[1])
    logits = context.logits_ids(QUESTION)
    context.save(tmp_path / "session")
    loaded = engine.LlamaCppContext.load(tmp_path / "session", pair.model, pair.found)
    assert bits(loaded) == bits(context)
    assert torch.allclose(loaded.logits_ids(QUESTION), logits, atol=3e-2)  # the same cells, summed up in another order
    assert (loaded.live_ids, loaded.erased, loaded.exact) == (context.live_ids, context.erased, context.exact)
    report = loaded.restore(receipt)
    assert not report.bit_exact
    assert loaded.erased == (spans[3],)


def test_saving_again_leaves_one_session_and_its_key(pair, tmp_path):
    context = pair.context()
    read(context)
    context.save(tmp_path)
    context.append(ids_of(3))
    context.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["session.key", "session.kveraser"]
    assert len(engine.LlamaCppContext.load(tmp_path, pair.model, pair.found)) == 81


@pytest.mark.parametrize("damage", ["cells", "missing", "model", "engine"])
def test_damaged_sessions_are_refused(pair, tmp_path, damage):
    context = pair.context()
    read(context)
    context.save(tmp_path)
    file = tmp_path / "session.kveraser"
    if damage == "cells":
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "missing":
        file.unlink()
    else:
        session, version = read_session(tmp_path, context.backend.stored_as)
        changes = {"model": {"model": {**session.index["model"], "parameters": 1}}, "engine": {"engine": "other"}}
        write_session(tmp_path, replace(session, index={**session.index, **changes[damage]}), version)
    with pytest.raises(kv.SessionFileError):
        engine.LlamaCppContext.load(tmp_path, pair.model, pair.found)


def test_a_session_is_saved_to_a_folder(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kv.SessionFileError, match="is a file"):
        pair.context().save(tmp_path / "file")
