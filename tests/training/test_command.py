"""`kveraser train`, with a tiny model in place of the real one; and the tiny preset on the real one."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml
from typer.testing import CliRunner

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.cli import app
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.runner import EvalOptions, draw, evaluate
from kveraser.methods import as_method
from kveraser.tasks import Filler, read_passages

runner = CliRunner()
SMALL = {
    stage: {"steps": 2, "contexts": 1, "tokens": [24, 60], "spacing": 40, "validate_every": 2, "validation_contexts": 1}
    for stage in ("pretrain", "finetune")
}


def run(*arguments):
    return runner.invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr("kveraser.cli.common.load_backbone", lambda *_, **__: (text_model(), make_tokenizer()))
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "eraser": {"rank": 2, "window": [2, 8]}}))
    return file


@pytest.mark.parametrize("command", ["pretrain", "finetune", "all"])
def test_every_stage_has_a_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: kveraser train" in " ".join(result.output.split())


def test_all_trains_both_stages_and_says_where_the_eraser_is(tmp_path, small, corpus):
    result = run("all", "-o", tmp_path / "out", "--config", small, "--text", corpus, "--seed", 7, "--model", "my/model")
    assert result.exit_code == 0, result.output
    assert "pretrain: best validation KL" in result.output
    assert "finetune: best validation KL" in result.output
    assert f"kveraser eval --model my/model --eraser {tmp_path / 'out' / 'eraser'}" in result.output
    assert kv.KVEraser.from_pretrained(tmp_path / "out" / "eraser", text_model()).window == (2, 8)
    kept = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (kept["seed"], kept["finetune"]["steps"]) == (7, 2)


def test_json_and_the_stages_one_by_one(tmp_path, small, corpus):
    options = ("-o", tmp_path / "out", "--config", small, "--text", corpus, "--json")
    for stage in ("pretrain", "finetune"):
        result = run(stage, *options)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert list(found["best_validation_kl"]) == [stage]
        assert (tmp_path / "out" / stage / "best").is_dir()


def test_lessons_of_several_epochs_are_kept_where_it_is_said_and_what_has_no_room_is_refused(tmp_path, small, corpus):
    options = ("-o", tmp_path / "out", "--config", small, "--text", corpus, "--json", "--set", "finetune.epochs=2")
    result = run("finetune", *options, "--store", tmp_path / "kept", "--store-limit", 0.00001)
    assert result.exit_code == 2
    assert "Raise --store-limit" in json.loads(result.stdout)["error"]["message"]
    result = run("finetune", *options, "--store", tmp_path / "kept")
    assert json.loads(result.stdout)["store"] == str(tmp_path / "kept")
    assert list((tmp_path / "kept" / "finetune").glob("train-000000-states.safetensors"))


def test_the_result_is_pushed_to_the_hub_when_asked(tmp_path, small, corpus, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr(kv.KVEraser, "push_to_hub", lambda self, repo, folder=None: f"https://hub/{repo}")
    result = run("pretrain", "-o", tmp_path / "out", "--config", small, "--text", corpus, "--push-to-hub", "me/mine")
    assert "https://hub/me/mine" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "finetune.tasks=[nothing]"], "no task 'nothing'"),
        (["--set", "colour=red"], "colour"),
        (["--preset", "huge"], "no preset 'huge'"),
        (["--text", "no-such-file.txt"], "no text source"),
        (["--start", "no-such-folder"], "no-such-folder holds neither a kveraser.json nor"),
        (["--config", "none.yaml"], "cannot read the configuration"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(tmp_path, small, arguments, said):
    result = run("all", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.model
def test_the_tiny_preset_learns_to_erase_on_the_real_model(tmp_path, smollm):
    """The smallest run there is, made smaller, end to end: its KL on unseen templates is at most 0.7 of no erase's."""
    changes = ["pretrain.steps=1", "pretrain.validate_every=1", "finetune.steps=2", "finetune.validate_every=2"]
    changes += [f"{stage}.{key}=1" for stage in ("pretrain", "finetune") for key in ("contexts", "validation_contexts")]
    settings = [part for change in changes for part in ("--set", change)]
    result = run("all", "-o", tmp_path / "out", "--preset", "tiny", *settings)
    assert result.exit_code == 0, result.output
    model, tokenizer = smollm
    eraser = kv.KVEraser.from_pretrained(tmp_path / "out" / "eraser", model)
    methods = (as_method("no-erase"), as_method("kveraser"))
    options = EvalOptions(("needle", "preference"), (128,), PROTOCOLS, methods, limit=2, max_new_tokens=8)
    filler = Filler(read_passages(), lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    records = []
    evaluate(model, tokenizer, eraser, options, draw(options, filler), records.append)
    kl = {
        method: statistics.mean(record.kl for record in records if record.method == method)
        for method in ("no-erase", "kveraser")
    }
    assert kl["kveraser"] <= 0.7 * kl["no-erase"], kl
