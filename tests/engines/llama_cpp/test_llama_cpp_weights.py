"""Whether a GGUF file is the backbone that an eraser was made for. It is told without llama.cpp."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import kveraser
from kveraser.errors import BackboneError


@pytest.fixture
def weights(monkeypatch):
    """The module, without the package around it, which loads llama.cpp's library."""
    file = Path(kveraser.__file__).parent / "engines" / "llama_cpp" / "weights.py"
    spec = importlib.util.spec_from_file_location("weights_alone", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def write(file, architecture, **tensors):
    writer = GGUFWriter(str(file), architecture)
    for key, value in {"embedding_length": 8, "feed_forward_length": 8, "block_count": 1}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_uint32(f"{architecture}.attention.head_count", 1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


EMBEDDING = {"token_embd.weight": np.ones((16, 8), np.float32)}
NORM = {"blk.0.attn_norm.weight": np.ones(8, np.float32)}


def test_a_model_without_the_norm_that_is_looked_at_differs_from_those_that_have_it(tmp_path, weights):
    """OLMo 2 has none in front of its attention: no shipped eraser is for it, which is no damage of the file."""
    llama = weights.gguf_fingerprint(write(tmp_path / "llama.gguf", "llama", **EMBEDDING, **NORM), "llama")
    olmo = write(
        tmp_path / "olmo.gguf", "olmo2", **EMBEDDING, **{"blk.0.post_attention_norm.weight": np.ones(8, np.float32)}
    )
    assert llama.difference_to(weights.gguf_fingerprint(olmo, "llama")) == "model_type is olmo2, it was made for llama"
    bare = weights.gguf_fingerprint(write(tmp_path / "bare.gguf", "llama", **EMBEDDING), "llama")
    assert "the weights are other ones" in llama.difference_to(bare)
    assert "the weights are other ones" in bare.difference_to(llama)


def test_a_file_that_is_no_language_model_is_still_named(tmp_path, weights):
    with pytest.raises(BackboneError, match=r"holds no tensor token_embd\.weight"):
        weights.gguf_fingerprint(write(tmp_path / "other.gguf", "clip", **NORM), "llama")
