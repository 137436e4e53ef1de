"""Bad input at the command line: a sentence about what is wrong, and exit code 2, never a traceback."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

import kveraser as kv
from kveraser.cli import app
from kveraser.cli.erase import parse_span

runner = CliRunner()
ERASE = ["erase", "-s", "x", "-a", "y", "-c"]
EVAL = ["eval", "-t", "needle", "-M", "no-erase", "--limit", "1"]


def run(*arguments, **options):
    return runner.invoke(app, [str(each) for each in arguments], **options)


class Said(str):
    """A message as it was shown; `in` asks for words wherever the lines were broken, also within a long path."""

    def __contains__(self, words):
        return "".join(words.split()) in "".join(self.split())


def said(result):
    """The message of a command that refused its input."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return Said(result.output)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "context.txt").write_text("the code is 1234")
    return tmp_path


def test_a_device_that_is_not_there_is_named_with_those_that_are(folder):
    assert "no device 'gpu'; there is: cpu" in said(run(*ERASE, folder / "context.txt", "--device", "gpu"))


@pytest.mark.parametrize("kind", ["gguf", "peft"])
def test_an_export_writes_a_file_where_a_file_belongs_and_a_folder_where_a_folder_does(folder, kind):
    wrong = folder / {"gguf": "folder", "peft": "file"}[kind]
    assert f"{wrong.name} is a" in said(run("export", kind, wrong))
    assert (folder / "file").read_text() == "mine"
    assert not list((folder / "folder").iterdir())


def test_a_text_that_is_given_in_place_of_its_source_is_refused():
    pasted = "Some words of my own, pasted here. " * 20
    result = run("eval", "--text", pasted, "--json")
    said(result)
    assert json.loads(result.stdout)["error"]["type"] == "OptionError"
    assert "no text source 'Some words of my own" in json.loads(result.stdout)["error"]["message"]


def test_standard_input_that_is_not_utf_8_is_refused():
    assert "cannot read the context from standard input" in said(run(*ERASE, "-", input=b"caf\xe9 is closed"))


def test_a_span_that_is_a_range_of_tokens_and_also_stands_in_the_context_is_refused_with_how_to_say_which(folder):
    """A time of day was taken for tokens: others than what it says were erased."""
    (folder / "context.txt").write_text("The bus leaves at 1:4 and the next at 12:55.")
    refused = said(run("erase", "-a", "y", "-c", folder / "context.txt", "-s", "1:4"))
    assert "For the text, give some of what is around it, too; for the tokens, write 01:4" in refused


@pytest.mark.parametrize(
    ("given", "context", "meant"),
    [
        ("1:4", "The bus leaves at 8:30.", kv.Span(1, 4)),
        ("2:5", "The bus leaves at 12:55.", kv.Span(2, 5)),
        ("01:4", "The bus leaves at 1:4.", kv.Span(1, 4)),
        ("at 1:4", "The bus leaves at 1:4.", "at 1:4"),
        ("1:4 ", "The bus leaves at 1:4 sharp.", "1:4 "),
    ],
)
def test_a_span_is_a_range_of_tokens_unless_it_is_a_text_of_the_context(given, context, meant):
    assert parse_span(given, context) == meant


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "0"])
def test_a_limit_of_the_store_that_is_no_number_of_gigabytes_is_refused_before_anything_is_loaded(tmp_path, limit):
    refused = said(run("train", "pretrain", "-o", tmp_path / "out", "--store-limit", limit))
    assert "--store-limit" in refused
    assert "must be above 0" in refused


def test_what_cannot_be_uploaded_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "HF_TOKEN" in said(run("train", "pretrain", "-o", tmp_path / "out", "--push-to-hub", "me/mine"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_disk_refuses_is_a_message_also_where_nobody_expects_it(folder, monkeypatch, as_json):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(folder / "out"))

    monkeypatch.setattr("kveraser.cli.export.write_peft_folder", full)
    result = run("export", "peft", folder / "out", *(["--json"] if as_json else []))
    assert "No space left on device" in said(result)
    if as_json:
        assert json.loads(result.stdout)["error"]["type"] == "OSError"


def test_a_reader_of_the_output_that_has_gone_is_not_an_error_of_ours(folder, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("kveraser.cli.export.write_peft_folder", gone)
    result = run("export", "peft", folder / "out")
    assert result.exit_code == 1
    assert "Broken pipe" not in result.output


TRAINING = [
    (["--set", "pretrain.steps=-1"], "steps=-1"),
    (["--set", "pretrain.steps=x"], "pretrain.steps"),
    (["--set", "pretrain.steps=.nan"], "pretrain.steps"),
    (["--set", "pretrain.learning_rate=.nan"], "learning_rate=nan"),
    (["--set", "pretrain.learning_rate=.inf"], "learning_rate=inf"),
    (["--set", "pretrain.clip=.nan"], "clip=nan"),
    (["--set", "pretrain.weight_decay=.nan"], "weight_decay=nan"),
    (["--set", "pretrain.cross_entropy=.nan"], "cross_entropy=nan"),
    (["--set", "pretrain.weights.cue=.nan"], "weights"),
    (["--set", "pretrain.together=.nan"], "together=nan"),
    (["--set", "pretrain.tokens=[64]"], "pretrain.tokens"),
    (["--set", "pretrain.repair=[-1]"], "repair"),
    (["--set", "pretrain.tasks=[]"], "at least one task"),
    (["--set", "eraser.rank=0"], "rank=0"),
    (["--set", "eraser.hidden=.nan"], "hidden=nan"),
    (["--set", "eraser.window=[1]"], "window"),
    (["--set", "eraser=3"], "expected the keys"),
    (["--set", "=3"], "3"),
    (["--set", "pretrain..steps=3"], "pretrain"),
    (["--set", "pretrain.tasks=[document-qa=x.json]"], "document-qa"),
    (["--seed", "x"], "--seed"),
    (["--dtype", "int8"], "int8"),
    (["--config", "{folder}/folder"], "cannot read the configuration"),
    (["--config", "{folder}/file"], "expected the keys"),
    (["--config", "{folder}/list.yaml"], "expected the keys"),
    (["--config", "{folder}/numbers.yaml"], "numbers.yaml"),
    (["--text", "{folder}/folder"], "holds no text"),
    (["--text", "{folder}/empty.txt"], "holds no text"),
    (["--text", "{folder}/binary.txt"], "cannot read"),
    (["--text", "{folder}/bad.jsonl"], "cannot read"),
    (["--text", ""], "no text source ''"),
    (["--text", "a\0b"], "text source"),
    (["--text", "hf:"], "hf:"),
    (["--start", "{folder}/folder"], "neither a kveraser.json"),
    (["--output", "{folder}/file"], "cannot write to"),
    (["--output", "{folder}/file/below"], "cannot write to"),
]


SHORT = [part for key in ("steps", "contexts", "validation_contexts") for part in ("--set", f"pretrain.{key}=1")]
SHORT += ["--set", "pretrain.tokens=[24,60]"]


@pytest.mark.parametrize(("arguments", "words"), TRAINING, ids=[" ".join(given)[:40] for given, _ in TRAINING])
def test_training_refuses_what_cannot_be(folder, monkeypatch, corpus, arguments, words):
    from conftest import make_tokenizer, text_model
    from kveraser.model.backbone import _as_dtype

    def load(*_, dtype=None, **__):
        return text_model() if dtype is None else text_model(_as_dtype(dtype)), make_tokenizer()

    monkeypatch.setattr("kveraser.cli.common.load_backbone", load)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    (folder / "bad.jsonl").write_text("{")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "numbers.yaml").write_text(yaml.safe_dump({1: 2}))
    given = [each.replace("{folder}", str(folder)) for each in arguments]
    if "--text" not in given:
        given += ["--text", corpus]
    if "--output" not in given:
        given += ["--output", str(folder / "out")]
    assert words in said(run("train", "pretrain", *SHORT, *given))
    assert not (folder / "out" / "pretrain").exists()
