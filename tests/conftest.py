"""Shared pieces of the tests: tiny random models of every architecture, and a tokenizer, built here (no network)."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import itertools
import json
from dataclasses import replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache, DynamicCache

import kveraser as kv
from kveraser.cache import growable_cache
from kveraser.model.view import model_dtype
from kveraser.training import EraserOptions, Stage, TrainConfig

pytest_plugins = ["serving_helpers", "llama_cpp_helpers"]  # their fixtures

settings.register_profile(
    "kveraser",
    deadline=None,
    max_examples=25,
    suppress_health_check=list(HealthCheck),
    derandomize=bool(os.environ.get("CI")),  # CI must not fail by chance; everybody else searches on
)
settings.load_profile("kveraser")


def pytest_collection_modifyitems(config, items):
    """The order of the tests; those of the Qwen backbones, 1.6 GB of files, run only when they are asked for by their marker."""
    items[:] = long_ones_first(items)
    if "backbones" in config.option.markexpr:
        return
    skipped = pytest.mark.skip(reason="needs the Qwen backbones, 1.6 GB to download: run `make test-backbones`")
    for item in items:
        if "backbones" in item.keywords:
            item.add_marker(skipped)


def long_ones_first(items):
    """Tests that take long begin each half of the list, file by file: two processes start with a half each."""
    files, others = {}, []
    for item in items:
        takes_long = {"model", "long"} & set(item.keywords)
        (files.setdefault(item.path, []) if takes_long else others).append(item)
    halves = [[item for file in list(files.values())[half::2] for item in file] for half in (0, 1)]
    middle = len(others) // 2
    return [*halves[0], *others[:middle], *halves[1], *others[middle:]]


VOCABULARY = 97
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
               "max_position_embeddings": 16384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


def make_config(family: str, kv_heads: int = 2, **changes):
    common = {**_COMMON, "num_key_value_heads": kv_heads, "intermediate_size": 48, **changes}
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen2":
        return Qwen2Config(**common)
    if family == "qwen3":
        return Qwen3Config(head_dim=8, **common)
    if family == "mistral":
        return MistralConfig(sliding_window=None, **common)
    if family == "phi3":
        return Phi3Config(**common)
    if family == "gpt_neox":
        common.pop("num_key_value_heads")
        return GPTNeoXConfig(rotary_pct=0.5, **common)
    raise KeyError(family)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox")


def build(config, dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Larger weights than the usual initialisation, so that attention and erasing have an effect worth measuring.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)
    return model.eval()


@lru_cache(maxsize=64)
def tiny(family="llama", kv_heads=2, dtype=torch.float32):
    """A tiny random model; shared between tests, which must leave it as it is."""
    return build(make_config(family, kv_heads), dtype)


_ERASERS = WeakKeyDictionary()


def random_eraser(model, scale=0.2, **options):
    """An eraser that changes something; the caller's own. A copy of one is made in a hundredth of the time that PEFT takes for it."""
    known = _ERASERS.setdefault(model, {})
    key = repr((scale, sorted(options.items()), model_dtype(model)))
    if key not in known:
        known[key] = eraser = kv.KVEraser.new(model, rank=4, alpha=8, **options)
        generator = torch.Generator().manual_seed(1)
        for _, parameter in eraser.named_parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
    return copy.deepcopy(known[key])


def token_ids(count, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, count), generator=generator)


@torch.no_grad()
def prefill(model, ids, borders=None, cache=None, mask=None):
    """A cache of `ids`, run in chunks that end at the given borders."""
    cache = DynamicCache() if cache is None else cache
    edges = sorted({0, ids.shape[1], *(borders or ())})
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for a, b in itertools.pairwise(edges):
        where = torch.arange(a, b)[None].expand(ids.shape[0], -1) if positions is None else positions[:, a:b]
        model(ids[:, a:b], position_ids=where, past_key_values=cache,
              attention_mask=None if mask is None else mask[:, :b])  # fmt: skip
    return cache


@torch.no_grad()
def next_logits(model, cache, ids, position=None, mask=None):
    """Logits of some more tokens behind a copy of the cache."""
    length = cache.get_seq_length()
    start = length if position is None else position
    where = torch.arange(start, start + ids.shape[1])[None].expand(ids.shape[0], -1)
    return model(ids, position_ids=where, past_key_values=copy.deepcopy(cache), attention_mask=mask).logits


def states(cache: Cache):
    """Copies of all keys and values."""
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def same(left, right):
    """Bit-equality of two lists of tensors."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def relative(left, right):
    """The largest relative difference of two lists of tensors."""
    return max(
        ((a.float() - b.float()).norm() / (b.float().norm() + 1e-9)).item() for a, b in zip(left, right, strict=True)
    )


CACHES = {"DynamicCache": DynamicCache, "growable": growable_cache}

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@lru_cache(maxsize=1)
def make_tokenizer():
    """A byte-level tokenizer with few merges: any text, and characters that take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator(["the code of the door is 1234, the color of the car is blue and it is fast"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   chat_template=CHAT_TEMPLATE)  # fmt: skip


@lru_cache(maxsize=4)
def text_model(dtype=torch.float32):
    """A tiny model with the tokenizer's vocabulary."""
    return build(make_config("llama", vocab_size=len(make_tokenizer())), dtype)


@pytest.fixture
def umask():
    """Sets the umask for the time of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path_factory, monkeypatch, request):
    """Keep measured cost models of tiny models out of the user's cache folder."""
    if not {"model", "backbones"} & {mark.name for mark in request.node.iter_markers()}:
        monkeypatch.setenv("KVERASER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def smollm():
    """The embedded model."""
    return kv.load_backbone(dtype="fp32")  # so that answers do not depend on what the machine is quick at


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


def write_corpus(folder):
    """A file of running text, for training."""
    file = folder / "corpus.txt"
    file.write_text(
        "\n\n".join(
            f"The car number {n} is blue and fast. It has a door with a code. The code is {n * 37}." for n in range(30)
        )
    )
    return str(file)


@pytest.fixture
def short(corpus):
    """Stages of a few steps on short contexts."""
    stage = Stage(
        ("span-neighbor",), steps=4, contexts=2, tokens=(24, 80), spacing=40, spans=2, learning_rate=5e-3, warmup=2,
        average=0.5, validate_every=2, validation_contexts=2, checkpoint_every=1,
    )  # fmt: skip
    return TrainConfig(
        EraserOptions(rank=2, alpha=4, window=(2, 16)), stage, replace(stage, tasks=("needle", "injection")), corpus
    )


@pytest.fixture
def questions_file(tmp_path):
    """Two questions in HotpotQA's format."""
    entry = {
        "question": "Who built the hall?",
        "answer": "Wagner",
        "context": [["Hall", ["The hall was built by Wagner."]], ["Town", ["The town is old."]]],
        "supporting_facts": [["Hall", 0]],
    }
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([entry, {**entry, "answer": "Bauer"}]))
    return file
