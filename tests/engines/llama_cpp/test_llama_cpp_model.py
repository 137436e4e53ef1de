"""Erasing inside llama.cpp with the embedded model: the eraser that ships, the demo's stories, twenty examples."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from kveraser.cli import app
from kveraser.demo.stories import stories
from kveraser.demo.tell import tell
from kveraser.engines.llama_cpp import METHODS, LlamaCppContext, LlamaCppModel
from kveraser.engines.llama_cpp.weights import gguf_fingerprint
from kveraser.eraser import shipped_eraser, shipped_erasers
from kveraser.evaluation import leaks, read_parts
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.runner import EvalOptions, draw
from kveraser.export import EraserFiles, write_gguf_backbone
from kveraser.methods import NoErase, as_method
from kveraser.model.backbone import embedded_gguf
from kveraser.model.fingerprint import Fingerprint
from kveraser.tasks import Filler, read_passages
from llama_cpp_helpers import without_effect

pytestmark = pytest.mark.model
QUESTION = "\nQuestion: What would Maria like to have for dinner?\nAnswer:"


@pytest.fixture(scope="module")
def loaded():
    return LlamaCppModel(threads=1)


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory):
    """The embedded model's weights as a float32 GGUF file (half a gigabyte, removed again)."""
    file = tmp_path_factory.mktemp("gguf") / "f32.gguf"
    write_gguf_backbone(embedded_gguf(), file, dtype="f32")
    yield file
    file.unlink()


def note(context):
    context.append("Notes about the user. Maria would like to have lasagna for dinner. She is a nurse.\n")
    wish = context.append("Maria would like to have sushi for dinner.\n")
    context.append("Maria likes to read in the evening.\n")
    return wish


def test_log_probabilities_are_those_of_transformers_on_twenty_examples(full_precision):
    model, tokenizer = kv.load_backbone(dtype="fp32")
    loaded = LlamaCppModel(full_precision, threads=1)
    found = loaded.find_eraser()
    tasks = ("needle", "tool-observation", "injection", "in-context", "tool-selection")
    options = EvalOptions(tasks, (256, 900), ("query_after",), (as_method("kveraser"),), limit=2)
    filler = Filler(read_passages(), lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    examples = draw(options, filler)
    assert len(examples) == 20
    worst = []
    for drawn in examples:
        theirs = kv.ErasableContext(model, tokenizer)
        ours = LlamaCppContext(loaded, found, length=2048, keys="f32", values="f32", flash_attention=False)
        spans = read_parts(theirs, drawn.example.parts)
        assert read_parts(ours, drawn.example.parts) == spans
        assert ours.live_ids == theirs.live_ids
        question = theirs.encode(drawn.example.question)
        assert ours.encode(drawn.example.question) == question
        receipts = theirs.erase(spans, kv.Steering(shipped_eraser(model), repair=32, choose="next")), ours.erase(spans)
        assert receipts[0].tokens_recomputed == receipts[1].tokens_recomputed
        rows = [each.logits_ids(question)[-1].float().cpu().log_softmax(-1) for each in (theirs, ours)]
        worst.append((rows[0] - rows[1]).abs().max().item())
        ours.close()
    print(f"largest difference of a log-probability, over 20 examples and all tokens: {max(worst):.1e}")
    assert max(worst) < 1e-2


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_the_erased_value_is_in_no_answer_after_erasing(loaded, story, protocol):
    context = LlamaCppContext(loaded, length=2048)
    results = {r.method: r for r in tell(story, context, [kind() for kind in METHODS], protocol)}
    assert not leaks(results["kveraser"].answer, story.erased), results["kveraser"].answer
    assert not leaks(results["full-recompute"].answer, story.erased)
    assert results["full-recompute"].kl < 1e-6
    assert results["kveraser"].kl < results["no-erase"].kl


def test_before_erasing_the_stories_do_tell_the_value(loaded):
    said = []
    for story in stories():
        context = LlamaCppContext(loaded, length=2048)
        said.append(leaks(tell(story, context, [NoErase()], "query_after")[0].answer, story.erased))
    assert sum(said) >= 3


def test_a_zero_adapter_with_the_full_prefix_changes_nothing(loaded, tmp_path, monkeypatch):
    folder = without_effect(shipped_erasers()["smollm2-135m-instruct"], tmp_path / "zero")
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    context = LlamaCppContext(loaded, loaded.find_eraser(folder), length=512, flash_attention=False)
    wish = note(context)
    before = context.logits(QUESTION)
    receipt = context.erase(wish, "kveraser:full_prefix=true,repair=0")
    assert receipt.tokens_recomputed == len(wish)
    assert torch.equal(context.logits(QUESTION), before)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_every_type_of_cache_forgets_and_remembers(loaded, kind):
    context = LlamaCppContext(loaded, length=512, keys=kind, values=kind)
    wish = note(context)
    before = context.logits(QUESTION)
    receipt = context.erase(wish)
    assert "sushi" not in context.generate(QUESTION, max_new_tokens=10)
    assert context.restore(receipt).bit_exact
    assert torch.equal(context.logits(QUESTION), before)


def test_the_eraser_is_recognised_by_the_weights_of_quantised_and_plain_files(loaded, full_precision):
    config = EraserFiles.read(shipped_erasers()["smollm2-135m-instruct"]).config
    assert config.fingerprint.difference_to(gguf_fingerprint(loaded.file, "llama")) is None
    assert config.fingerprint.difference_to(gguf_fingerprint(full_precision, "llama")) is None
    assert isinstance(config.fingerprint, Fingerprint)


def test_tokens_are_those_of_the_transformers_tokenizer(loaded, smollm):
    for story in stories():
        for text in (story.prefix, story.span, story.suffix, "Größe: 1,5 €\t\n  <|im_start|>user\n日本語 🎉"):
            ids = smollm[1].encode(text, add_special_tokens=False)
            assert loaded.tokenizer.encode(text, add_special_tokens=False) == ids
            assert loaded.tokenizer.decode(ids) == text


def test_the_demo_runs_on_llama_cpp():
    result = CliRunner().invoke(app, ["demo", "--engine", "llama-cpp", "--no-latency", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["engine"] == "llama-cpp"
    assert [row["method"] for row in told["stories"][0]["query_after"]] == [
        "no-erase", "full-recompute", "delete-and-shift", "local-suffix-repair:tokens=70", "attention-guided-repair:tokens=70",
        "kveraser:repair=70",
    ]  # fmt: skip
    for bad in (["--device", "cpu"], ["-m", "some/model"]):
        assert CliRunner().invoke(app, ["demo", "--engine", "llama-cpp", *bad]).exit_code == 2
