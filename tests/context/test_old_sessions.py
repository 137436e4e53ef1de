"""Sessions that were saved before the contexts of all engines became one (`tests/context/sessions`) still load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model

SESSIONS = Path(__file__).parent / "sessions"


def test_a_session_of_transformers_goes_on():
    model = text_model()
    ctx = kv.ErasableContext.load(SESSIONS / "transformers", model, make_tokenizer(), random_eraser(model))
    assert ctx.text.endswith("<s>tool\n</s>\n<s>tool\n</s>\n<s>tool\n</s>\n<s>user\ngo on</s>\n")
    assert ctx.erased == (kv.Span(40, 44), kv.Span(52, 56), kv.Span(64, 68))
    assert [message.id for message, _ in ctx.messages] == [None, "call-1", "call-2", "call-3", None]
    first, last = ctx.receipts  # the other one was made final
    assert (first.method, last.method) == ("kveraser", "kveraser")
    assert not ctx.exact
    assert ctx.generate("and?", max_new_tokens=3) is not None
    ctx.restore(last)
    assert "it is fast" in ctx.text
    ctx.restore(first)
    assert "the code is 1234" in ctx.text
    assert "the car is blue" not in ctx.text
    assert ctx.exact


def test_a_session_of_llama_cpp_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")
    from kveraser.engines.llama_cpp import LlamaCppContext, LlamaCppModel
    from llama_cpp_helpers import tiny_pair

    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    tiny_pair(tmp_path / "llama.gguf")
    ctx = LlamaCppContext.load(SESSIONS / "llama_cpp", LlamaCppModel(tmp_path / "llama.gguf", threads=1))
    assert (ctx.text, ctx.room) == ("the cat came home", 37)
    assert ctx.erased == (kv.Span(7, 18), kv.Span(18, 29))
    assert (ctx.backend.cells.keys, ctx.messages, ctx.exact) == ("q8_0", (), False)
    assert ctx.generate("and", max_new_tokens=3) is not None
    second, first = ctx.receipts[1], ctx.receipts[0]
    assert (first.method, second.method) == ("full-recompute", "kveraser")
    ctx.restore(second)
    ctx.restore(first)
    assert ctx.text == "the cat and the hat then the dog came home"
    assert ctx.exact


def _states_file(folder):
    return next(file for file in folder.iterdir() if file.name != "session.json")


def _edit_index(folder, change):
    data = json.loads((folder / "session.json").read_text())
    change(data)
    (folder / "session.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _states_file(f).write_bytes(_states_file(f).read_bytes()[:-10]), "truncated or altered"),
        (lambda f: _states_file(f).write_bytes(_states_file(f).read_bytes()[:-1] + b"x"), "truncated or altered"),
        (lambda f: _states_file(f).unlink(), "is missing"),
        (lambda f: (f / "session.json").unlink(), "is missing"),
        (lambda f: (f / "session.json").write_text("{"), "cannot be read"),
        (lambda f: _edit_index(f, lambda d: d["session"].update(length=1)), "was altered"),
        (lambda f: _edit_index(f, lambda d: d.update(format=99)), "format 99"),
        (lambda f: _edit_index(f, lambda d: d.pop("session")), "cannot be read"),
    ],
)
def test_a_damaged_one_is_refused_by_name(tmp_path, damage, words):
    shutil.copytree(SESSIONS / "transformers", tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(kv.SessionFileError, match=words):
        kv.ErasableContext.load(tmp_path / "s", text_model(), make_tokenizer(), random_eraser(text_model()))
