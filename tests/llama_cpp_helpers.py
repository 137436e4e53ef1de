"""Tiny random models as GGUF files: the same weights for llama.cpp and for transformers; and contexts of them."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import kveraser as kv
from conftest import build, make_config, random_eraser
from kveraser.export.names import Naming
from kveraser.model.fingerprint import Fingerprint


@contextmanager
def failing_decode(context, after, error=RuntimeError):
    """In a context of llama.cpp, every decode but the first `after` fails; afterwards they work again."""
    calls, decode = [], context.backend.cells._decode

    def failing(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise error("stop")
        decode(*arguments)

    context.backend.cells._decode = failing
    try:
        yield
    finally:
        context.backend.cells._decode = decode


VOCABULARY = 320
LETTERS = [chr(code) for code in range(33, 127)]


def tiny_pair(file, family="llama", heads=4, kv_heads=2, head=64, layers=3, tokenizer=None, **changes):
    """A random transformers model, and its GGUF file at `file`; with the vocabulary of a byte-level tokenizer, if one is given."""
    vocabulary = VOCABULARY if tokenizer is None else len(tokenizer)
    config = make_config(
        family, kv_heads, vocab_size=vocabulary, hidden_size=heads * head, intermediate_size=96,
        num_attention_heads=heads, num_hidden_layers=layers, max_position_embeddings=2048, tie_word_embeddings=True,
        **changes,
    )  # fmt: skip
    if hasattr(config, "head_dim"):
        config.head_dim = head
    model = build(config)
    naming = Naming(Fingerprint.of(model).shape)
    arch = naming.architecture.name
    writer = GGUFWriter(str(file), arch)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_add_bos_token(False)
    if tokenizer is None:
        tokens = [*LETTERS, "Ġ", "Ċ", "th"]
        tokens += [f"[unused{n}]" for n in range(VOCABULARY - len(tokens) - 1)] + ["</s>"]
        special, merges, end = {"</s>"}, ["t h"], VOCABULARY - 1
    else:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens = tokenizer.convert_ids_to_tokens(list(range(vocabulary)))
        special, end = set(tokenizer.all_special_tokens), tokenizer.eos_token_id
        merges = [" ".join(pair) for pair in core["model"]["merges"]]
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end)
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head":
            continue
        values = naming.rows(module, weight.float().numpy())
        writer.add_tensor(naming.tensor(module).removesuffix("weight") + kind, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def without_effect(folder, target):
    """A copy of an eraser's folder whose LoRA B is zero."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(str(folder / "adapter_model.safetensors"))
    zeroed = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()}
    save_file(zeroed, str(target / "adapter_model.safetensors"))
    return target


def ids_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 90, (count,), generator=generator).tolist()


WINDOW, REPAIR = (2, 9), 5
ERASING = ("kveraser", "delete-and-shift", "local-suffix-repair", "full-recompute")
CACHES = {
    "f32": {"keys": "f32", "values": "f32", "flash_attention": False},
    "f16": {"keys": "f16", "values": "f16"},
    "q8_0": {"keys": "q8_0", "values": "q8_0"},
    "q4_0 keys": {"keys": "q4_0", "values": "f16", "flash_attention": False},
}


class Pair:
    """One backbone and one eraser, in transformers and in llama.cpp."""

    def __init__(self, folder, family="llama", **options):
        from kveraser.engines.llama_cpp import LlamaCppModel

        self.file = folder / f"{family}.gguf"
        self.backbone = tiny_pair(self.file, family, **options)
        self.eraser = random_eraser(self.backbone, window=WINDOW, repair=REPAIR, choose="next")
        self.folder = self.eraser.save_pretrained(folder / f"{family}-eraser", dtype=torch.float32)
        self.model = LlamaCppModel(self.file, threads=1)
        self.found = self.model.find_eraser(self.folder)

    def context(self, cache="f32", eraser=None, **options):
        from kveraser.engines.llama_cpp import LlamaCppContext

        return LlamaCppContext(self.model, eraser or self.found, **{"length": 512, **CACHES[cache], **options})


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama-cpp")


@pytest.fixture(scope="module")
def pair(llama_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVERASER_CACHE", str(llama_folder / "cache"))
        return Pair(llama_folder)


def read(context, sizes=(30, 8, 40), seed=0):
    """Let a context read parts of so many tokens; their spans."""
    ids = ids_of(sum(sizes), seed)
    spans, at = [], 0
    for size in sizes:
        spans.append(context.append(ids[at : at + size]))
        at += size
    return spans


def bits(context):
    return context.backend.cells.read([kv.Span(0, context.backend.length)]).tobytes()


def equal(left, right):
    """Whether cells are the same; a rotation by nothing, which llama.cpp applies to all keys, may flip the sign of zeros."""
    if len(left) != len(right):
        return False
    return all({a, b} == {0, 0x80} for a, b in zip(left, right, strict=True) if a != b)


def states(context, span):
    return context.backend.cells.read([span]).tobytes()


def each_slot(context):
    return [states(context, kv.Span(slot, slot + 1)) for slot in range(context.backend.length)]


def changed(before, after):
    return {slot for slot, (a, b) in enumerate(zip(before, after, strict=True)) if not equal(a, b)}


QUESTION = ids_of(6, seed=9)
